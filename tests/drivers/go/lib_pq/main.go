// lib/pq: the pool of database/sql, unnamed and prepared statements, transactions, COPY, arrays, hstore, settings of the
// startup message, its listener, contexts that end.
package main

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/hstore"

	"pgflip/load"
)

func text(s string) sql.NullString { return sql.NullString{String: s, Valid: true} }

var (
	moods  = []sql.NullString{text("sad"), {}, text("so so")}
	places = pq.StringArray{"(2,c)", `(,"")`}
	tags   = hstore.Hstore{Map: map[string]sql.NullString{"k": text("v w"), "n": {}}}
)

const (
	place = `(1,"a, ""b""")`
	read  = "select mood, moods, place, places, tags from driver_sample where id = $1"
	write = "insert into driver_ledger (id, mood, moods, place, places, tags) values ($1, $2, $3, $4, $5, $6)"
)

func main() {
	l := load.New("lib-pq", os.Args[1])
	db, err := sql.Open("postgres", l.URL+"?sslmode=disable&application_name=lib-pq&TimeZone=Asia/Tokyo&app.tenant=kept")
	if err != nil {
		panic(err)
	}
	db.SetMaxOpenConns(l.Busy + 1)
	db.SetMaxIdleConns(l.Busy + 1)
	// A reconnect would lose notifications: it is an error.
	listener := pq.NewListener(l.URL+"?sslmode=disable", time.Second, time.Minute, func(what pq.ListenerEventType, err error) {
		if what != pq.ListenerEventConnected {
			l.Expect("listener", what, pq.ListenerEventConnected)
		}
	})
	if err := listener.Listen("lib-pq"); err != nil {
		panic(err)
	}
	heard := make(chan struct{})
	go func() {
		for one := range listener.Notify {
			if one == nil || one.Extra == "end" {
				break
			}
			l.Heard(one.Extra)
		}
		close(heard)
	}()
	l.Run(func(number int) (load.Round, error) {
		insert, err := db.Prepare("insert into driver_ledger (id) values ($1)")
		if err != nil {
			return nil, err
		}
		reading, err := db.Prepare(read)
		return func(id load.IDs, number int, held bool) error {
			if held {
				return giveUp(l, db, id(0))
			}
			if number == 0 {
				if _, err := db.Exec("select pg_notify('lib-pq', $1)", id(0)); err != nil {
					return err
				}
				l.Notified(id(0))
			}
			return round(l, db, insert, reading, id)
		}, err
	}, func() error {
		_, err := db.Exec("select pg_notify('lib-pq', 'end')")
		if err == nil {
			<-heard
		}
		return err
	})
}

func giveUp(l *load.Load, db *sql.DB, id string) error {
	short, cancel := context.WithTimeout(context.Background(), load.Patience)
	defer cancel()
	_, err := db.ExecContext(short, "insert into driver_ledger (id) values ($1)", id)
	var canceled *pq.Error
	l.Expect("a context that ends", errors.As(err, &canceled) && canceled.Code == "57014", true)
	return nil
}

func round(l *load.Load, db *sql.DB, insert, reading *sql.Stmt, id load.IDs) error {
	if _, err := insert.Exec(id(0)); err != nil {
		return err
	}
	l.Acknowledge(id(0))
	// Parse and Describe with one Sync, Bind and Execute with the next: the unnamed statement has to outlive a flip in between.
	if _, err := db.Exec(write, id(1), "so so", pq.Array(moods), place, places, tags); err != nil {
		return err
	}
	l.Acknowledge(id(1))
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.Stmt(insert).Exec(id(2)); err != nil {
		return err
	}
	copying, err := tx.Prepare(pq.CopyIn("driver_ledger", "id"))
	if err != nil {
		return err
	}
	if _, err := copying.Exec(id(3)); err != nil {
		return err
	}
	if _, err := copying.Exec(); err != nil {
		return err
	}
	if err := copying.Close(); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	l.Acknowledge(id(2), id(3))
	for what, query := range map[string]func() *sql.Row{
		"prepared": func() *sql.Row { return reading.QueryRow(1) },
		"unnamed":  func() *sql.Row { return db.QueryRow(read, 1) },
	} {
		var foundMood, foundPlace string
		var foundMoods []sql.NullString
		var foundPlaces pq.StringArray
		var foundTags hstore.Hstore
		err := query().Scan(&foundMood, pq.Array(&foundMoods), &foundPlace, &foundPlaces, &foundTags)
		if err != nil {
			return err
		}
		found := []interface{}{foundMood, foundMoods, foundPlace, foundPlaces, foundTags}
		l.Expect("values, "+what, found, []interface{}{"so so", moods, place, places, tags})
	}
	var tenant, zone string
	kept := db.QueryRow("select current_setting('app.tenant'), current_setting('timezone')")
	if err := kept.Scan(&tenant, &zone); err != nil {
		return err
	}
	l.Expect("settings", []string{tenant, zone}, []string{"kept", "Asia/Tokyo"})
	return nil
}
