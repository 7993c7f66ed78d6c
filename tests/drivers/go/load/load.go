// Package load is what the drivers in Go share; the same as load.py, which says it in words.
package load

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"sync"
	"time"
)

const pause = 200 * time.Millisecond

// Patience is how long a client waits while it is held.
const Patience = 300 * time.Millisecond

// Load is what the workers of a driver did.
type Load struct {
	Name, URL, Listen string
	Busy              int
	mutex             sync.Mutex
	held, stop, alone event
	notified, heard   []string
	said              struct {
		Version      string   `json:"version"`
		Acknowledged []string `json:"acknowledged"`
		Errors       []string `json:"errors"`
		Wrong        []string `json:"wrong"`
	}
}

type event struct {
	happened chan struct{}
	once     sync.Once
}

func (e *event) happens() { e.once.Do(func() { close(e.happened) }) }

func (e *event) passed() bool {
	select {
	case <-e.happened:
		return true
	default:
		return false
	}
}

// IDs makes the ids of a round from numbers.
type IDs func(k int) string

// Round is what a worker does. Held: clients are held, and what it asks for it gives up again.
type Round func(id IDs, number int, held bool) error

// New reads the arguments and listens for the end.
func New(name, version string) *Load {
	l := &Load{Name: name, URL: os.Args[len(os.Args)-2]}
	for _, e := range []*event{&l.held, &l.stop, &l.alone} {
		e.happened = make(chan struct{})
	}
	l.Listen = fmt.Sprintf("select pg_advisory_lock(20000, hashtext('%s'))", name)
	l.Busy, _ = strconv.Atoi(os.Args[len(os.Args)-1])
	l.said.Version = version
	l.said.Acknowledged, l.said.Errors, l.said.Wrong = []string{}, []string{}, []string{}
	go func() {
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			l.held.happens()
		}
		l.end()
	}()
	return l
}

func (l *Load) end() {
	l.stop.happens()
	l.held.happens()
}

// Notified notes what was sent, Heard what came.
func (l *Load) Notified(payload string) { l.notified = append(l.notified, payload) }

// Heard is called by one goroutine.
func (l *Load) Heard(payload string) { l.heard = append(l.heard, payload) }

// Acknowledge notes ids that have been committed.
func (l *Load) Acknowledge(ids ...string) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	l.said.Acknowledged = append(l.said.Acknowledged, ids...)
}

// Expect compares values and types.
func (l *Load) Expect(what string, found, expected interface{}) {
	if !reflect.DeepEqual(found, expected) {
		l.mutex.Lock()
		defer l.mutex.Unlock()
		if len(l.said.Wrong) < 5 {
			l.said.Wrong = append(l.said.Wrong, fmt.Sprintf("%s: %s, not %s", what, text(found), text(expected)))
		}
	}
}

func text(value interface{}) string {
	text, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%T %s", value, text)
}

// Run runs rounds in workers; open prepares one. last is called when only the listener is left.
func (l *Load) Run(open func(number int) (Round, error), last func() error) {
	busy, idle := sync.WaitGroup{}, sync.WaitGroup{}
	one := func(number int, group *sync.WaitGroup) {
		group.Add(1)
		go func() {
			defer group.Done()
			l.failed(l.work(number, open))
		}()
	}
	for n := 0; n < l.Busy; n++ {
		one(n, &busy)
	}
	one(l.Busy, &idle)
	busy.Wait()
	l.alone.happens()
	idle.Wait()
	l.failed(last())
	l.Expect("notifications", l.heard, l.notified)
	json.NewEncoder(os.Stdout).Encode(l.said)
}

func (l *Load) failed(err error) {
	if err != nil {
		l.mutex.Lock()
		defer l.mutex.Unlock()
		l.said.Errors = append(l.said.Errors, err.Error())
		l.end()
	}
}

func (l *Load) work(number int, open func(int) (Round, error)) error {
	round, err := open(number)
	idle := number == l.Busy
	for i := 1; err == nil; i++ {
		last := l.stop.passed() && (!idle || l.alone.passed())
		held := idle && i == 2
		if !held || !l.stop.passed() {
			err = round(func(k int) string { return fmt.Sprintf("%s/%d/%d/%d", l.Name, number, i, k) }, number, held)
		}
		switch {
		case last:
			return err
		case held:
			fmt.Println("gave up")
			<-l.alone.happened
		case idle:
			<-l.held.happened
		default:
			select {
			case <-l.stop.happened:
			case <-time.After(pause):
			}
		}
	}
	return err
}
