// pgx: its own pool, its statement cache, batches, COPY in binary, transactions, registered enum, composite, arrays of
// them, and hstore, notifications, contexts that end.
package main

import (
	"context"
	"errors"
	"os"

	"github.com/jackc/pgtype"
	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"

	"pgflip/load"
)

var all = context.Background()

type place struct {
	X    *int32
	Name *string
}

const (
	read  = "select mood, moods, place, places, tags from driver_sample where id = $1"
	write = "insert into driver_ledger (id, mood, moods, place, places, tags) values ($1, $2, $3, $4, $5, $6)"
)

func register(l *load.Load) func(context.Context, *pgx.Conn) error {
	return func(_ context.Context, c *pgx.Conn) error {
		var mood, moods, where, wheres, tags uint32
		err := c.QueryRow(all, `select 'driver_mood'::regtype::oid, 'driver_mood[]'::regtype::oid, 'driver_place'::regtype::oid,
			'driver_place[]'::regtype::oid, 'hstore'::regtype::oid`).Scan(&mood, &moods, &where, &wheres, &tags)
		if err != nil {
			return err
		}
		info := c.ConnInfo()
		enum := pgtype.NewEnumType("driver_mood", []string{"sad", "ok", "so so"})
		composite, err := pgtype.NewCompositeType("driver_place", []pgtype.CompositeTypeField{
			{Name: "x", OID: pgtype.Int4OID}, {Name: "name", OID: pgtype.TextOID}}, info)
		if err != nil {
			return err
		}
		for _, one := range []pgtype.DataType{
			{Value: enum, Name: "driver_mood", OID: mood},
			{Value: composite, Name: "driver_place", OID: where},
			{Value: &pgtype.Hstore{}, Name: "hstore", OID: tags},
		} {
			info.RegisterDataType(one)
		}
		array := func(name string, element uint32) pgtype.ValueTranscoder {
			return pgtype.NewArrayType(name, element, func() pgtype.ValueTranscoder {
				data, _ := info.DataTypeForOID(element)
				return pgtype.NewValue(data.Value).(pgtype.ValueTranscoder)
			})
		}
		info.RegisterDataType(pgtype.DataType{Value: array("driver_mood[]", mood), Name: "driver_mood[]", OID: moods})
		info.RegisterDataType(pgtype.DataType{Value: array("driver_place[]", where), Name: "driver_place[]", OID: wheres})
		if _, err = c.Exec(all, "set app.tenant = 'kept'"); err != nil {
			return err
		}
		_, err = c.Exec(all, "set timezone = 'Asia/Tokyo'")
		return err
	}
}

func main() {
	l := load.New("pgx", os.Args[1])
	config, err := pgxpool.ParseConfig(l.URL + "?application_name=pgx")
	if err != nil {
		panic(err)
	}
	config.MaxConns = int32(l.Busy + 1)
	config.AfterConnect = register(l)
	pool, err := pgxpool.ConnectConfig(all, config)
	if err != nil {
		panic(err)
	}
	listener, err := pgx.Connect(all, l.URL)
	if err != nil {
		panic(err)
	}
	if _, err := listener.Exec(all, "listen pgx; "+l.Listen); err != nil {
		panic(err)
	}
	l.Run(func(int) (load.Round, error) {
		return func(id load.IDs, number int, held bool) error {
			if held {
				return giveUp(l, pool, id(0))
			}
			if number == 0 {
				if _, err := pool.Exec(all, "select pg_notify('pgx', $1)", id(0)); err != nil {
					return err
				}
				l.Notified(id(0))
			}
			return round(l, pool, id)
		}, nil
	}, func() error {
		// What was committed before is heard before the answer.
		if _, err := listener.Exec(all, "select 1"); err != nil {
			return err
		}
		for {
			short, cancel := context.WithTimeout(all, load.Patience)
			one, err := listener.WaitForNotification(short)
			cancel()
			if err != nil {
				return nil
			}
			l.Heard(one.Payload)
		}
	})
}

func giveUp(l *load.Load, pool *pgxpool.Pool, id string) error {
	short, cancel := context.WithTimeout(all, load.Patience)
	defer cancel()
	_, err := pool.Exec(short, "insert into driver_ledger (id) values ($1)", id)
	l.Expect("a context that ends", errors.Is(err, context.DeadlineExceeded), true)
	return nil
}

func round(l *load.Load, pool *pgxpool.Pool, id load.IDs) error {
	one, two, a, c, empty, sad, soSo := int32(1), int32(2), `a, "b"`, "c", "", "sad", "so so"
	moods := []*string{&sad, nil, &soSo}
	places, written := []place{{&two, &c}, {nil, &empty}}, [][]interface{}{{two, c}, {nil, empty}}
	tags := pgtype.Hstore{Status: pgtype.Present, Map: map[string]pgtype.Text{
		"k": {String: "v w", Status: pgtype.Present}, "n": {Status: pgtype.Null}}}
	if _, err := pool.Exec(all, "insert into driver_ledger (id) values ($1)", id(0)); err != nil {
		return err
	}
	l.Acknowledge(id(0))
	if _, err := pool.Exec(all, write, id(1), soSo, moods, []interface{}{one, a}, written, tags); err != nil {
		return err
	}
	l.Acknowledge(id(1))
	batch := &pgx.Batch{}
	for k := 2; k < 4; k++ {
		batch.Queue("insert into driver_ledger (id) values ($1)", id(k))
	}
	if err := pool.SendBatch(all, batch).Close(); err != nil {
		return err
	}
	l.Acknowledge(id(2), id(3))
	err := pool.BeginFunc(all, func(tx pgx.Tx) error {
		_, err := tx.CopyFrom(all, pgx.Identifier{"driver_ledger"}, []string{"id"}, pgx.CopyFromRows([][]interface{}{{id(4)}}))
		return err
	})
	if err != nil {
		return err
	}
	l.Acknowledge(id(4))
	var foundMood string
	var foundMoods []*string
	var foundPlace place
	var foundPlaces []place
	var foundTags pgtype.Hstore
	if err := pool.QueryRow(all, read, 1).Scan(&foundMood, &foundMoods, &foundPlace, &foundPlaces, &foundTags); err != nil {
		return err
	}
	found := []interface{}{foundMood, foundMoods, foundPlace, foundPlaces, foundTags}
	l.Expect("values", found, []interface{}{soSo, moods, place{&one, &a}, places, tags})
	var tenant, zone string
	kept := pool.QueryRow(all, "select current_setting('app.tenant'), current_setting('timezone')")
	if err := kept.Scan(&tenant, &zone); err != nil {
		return err
	}
	l.Expect("settings", []string{tenant, zone}, []string{"kept", "Asia/Tokyo"})
	return nil
}
