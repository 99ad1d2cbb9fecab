package nameserver

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

const (
	// tellEvery is for how long questions for one name become one record.
	tellEvery = 50 * time.Millisecond
	// maxWaiting bounds the names whose record is not written yet.
	maxWaiting = 4096
	// allowEvery is how often a name that is answered is recorded, and maxSeen for
	// how many that is remembered.
	allowEvery = 24 * time.Hour
	maxSeen    = 1 << 16
	// overEvery is for how long the questions for a name beyond a budget are told once,
	// and maxOver of how many such names.
	overEvery = time.Hour
	maxOver   = 4096
	saveEvery = time.Second
)

// A ledger brings what was asked into the audit log, beside the answers: nobody
// waits for it, and a question repeated thousands of times is one record that
// says so. Of names that are answered the first question in a day is recorded, of
// those beyond a budget the first in an hour, and at its end how many came after it.
type ledger struct {
	record func(*audit.Record) error
	log    *slog.Logger
	seen   func(name string)

	mu      sync.Mutex // guards what follows
	waiting []asking
	over    []beyond      // workloads that ask too much
	lost    uint64        // questions for names that had no room to wait
	wake    chan struct{} // has a place
	// told is when answered names were recorded, and tolds the same, the oldest first.
	told  map[asked]time.Time
	tolds []asked
	// repeated are the names beyond a budget of the last hour, the oldest first, and
	// again the same by name; only who tells knows them.
	repeated []*refusal
	again    map[asked]*refusal
}

// A refusal is of a name beyond a budget, since its record was written.
type refusal struct {
	asked
	rec   audit.Record
	since time.Time
	more  uint64 // questions that are in no record yet
}

// An asking is a name that was asked for, by whom, first from where.
type asking struct {
	who  spiffeid.ID
	e    *entry
	from netip.AddrPort
}

// beyond is who asks more than it may.
type beyond struct {
	who spiffeid.ID
	b   *budget
}

type asked struct {
	who  spiffeid.ID
	name string
}

func (l *ledger) open(cfg Config) {
	l.record, l.log, l.seen = cfg.Record, cfg.Log, cfg.Book.Seen
	l.wake, l.told, l.again = make(chan struct{}, 1), map[asked]time.Time{}, map[asked]*refusal{}
}

// asked notes a question. Only the first since the last record takes the lock.
func (l *ledger) asked(who spiffeid.ID, e *entry, from func() netip.AddrPort) {
	if e.result == Inside || e.result == Search || e.asked.Add(1) != 1 {
		return
	}
	l.mu.Lock()
	if len(l.waiting) < maxWaiting {
		l.waiting = append(l.waiting, asking{who, e, from()})
	} else {
		l.lost += e.asked.Swap(0)
	}
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// beyond notes a question that got no answer. It is told with the others of a
// second.
func (l *ledger) beyond(who spiffeid.ID, b *budget) {
	if b.beyond.Add(1) != 1 {
		return
	}
	l.mu.Lock()
	l.over = append(l.over, beyond{who, b}) // each workload once
	l.mu.Unlock()
}

// tellBeyond records who asked more than it may.
func (l *ledger) tellBeyond() {
	l.mu.Lock()
	list := l.over
	l.over = nil
	l.mu.Unlock()
	for _, o := range list {
		err := l.record(&audit.Record{
			Kind: audit.KindName, Decision: audit.Deny, Reason: string(TooMany), Dir: string(mesh.Out), Src: o.who.String(),
			Detail: fmt.Sprintf("%d questions beyond what it may ask in a second got no answer", o.b.beyond.Swap(0)),
		})
		if err != nil {
			l.log.Error("questions beyond the rate were not recorded", "err", err)
		}
	}
}

// run writes records until ctx ends, and then what is left.
func (l *ledger) run(ctx context.Context, save func()) {
	saved := time.NewTicker(saveEvery)
	defer saved.Stop()
	for {
		select {
		case <-ctx.Done():
			l.tell()
			l.tellBeyond()
			l.tellRefused(true)
			save()
			return
		case <-saved.C:
			l.tellBeyond()
			l.tellRefused(false)
			save()
		case <-l.wake:
			l.tell()
			pause := time.NewTimer(tellEvery)
			select {
			case <-ctx.Done():
			case <-pause.C:
			}
			pause.Stop()
		}
	}
}

func (l *ledger) tell() {
	l.mu.Lock()
	list, lost := l.waiting, l.lost
	l.waiting, l.lost = nil, 0
	l.mu.Unlock()
	var failed error
	unwritten := 0
	write := func(r *audit.Record) bool {
		err := l.record(r)
		if err != nil {
			failed = err
			unwritten++
		}
		return err == nil
	}
	for _, a := range list {
		n := a.e.asked.Swap(0)
		switch {
		case n == 0:
		case a.e.result == Invented:
			if rec := l.refuse(a, n); rec != nil && !write(rec) {
				l.unrefuse()
			}
		case a.e.absent:
			write(recordOf(a, n))
		case l.first(a):
			l.seen(a.e.name) // its answer is kept ready, its address must be, too
			if !write(recordOf(a, n)) {
				l.unfirst()
			}
		}
	}
	if lost > 0 {
		write(&audit.Record{
			Kind: audit.KindName, Decision: audit.Deny, Reason: string(Denied), Dir: string(mesh.Out),
			Detail: fmt.Sprintf("%d questions for more names than are told one by one, be they allowed or not", lost),
		})
	}
	if failed != nil { // of a flood one line
		l.log.Error("questions were not recorded", "names", unwritten, "err", failed)
	}
}

// refuse is the record of a name beyond a budget; nil when it is counted with the one
// before.
func (l *ledger) refuse(a asking, n uint64) *audit.Record {
	key := asked{a.who, a.e.name}
	if r := l.again[key]; r != nil {
		r.more += n
		return nil
	}
	if len(l.repeated) >= maxOver {
		l.tellOldest()
	}
	r := &refusal{asked: key, rec: *recordOf(a, 1), since: time.Now()}
	l.again[key] = r
	l.repeated = append(l.repeated, r)
	return recordOf(a, n)
}

// unrefuse takes back what refuse has just noted: there is no record to count with.
func (l *ledger) unrefuse() {
	last := len(l.repeated) - 1
	delete(l.again, l.repeated[last].asked)
	l.repeated[last] = nil
	l.repeated = l.repeated[:last]
}

// tellRefused records how often names beyond a budget were asked for again in an hour
// that is over, or with all until now.
func (l *ledger) tellRefused(all bool) {
	now := time.Now()
	for len(l.repeated) > 0 && (all || now.Sub(l.repeated[0].since) >= overEvery) {
		l.tellOldest()
	}
}

// tellOldest forgets the oldest of them, and records how often it was asked for again.
func (l *ledger) tellOldest() {
	r := l.repeated[0]
	l.repeated[0] = nil
	l.repeated = l.repeated[1:]
	delete(l.again, r.asked)
	if r.more == 0 {
		return
	}
	r.rec.Detail += fmt.Sprintf("; asked %d times more since %s", r.more, r.since.UTC().Format(time.RFC3339))
	if err := l.record(&r.rec); err != nil {
		l.log.Error("questions for a name beyond its budget were not recorded", "n", r.more, "err", err)
	}
}

// first says that an answered name is to be told of again.
func (l *ledger) first(a asking) bool {
	key := asked{a.who, a.e.name}
	now := time.Now()
	for len(l.tolds) > 0 && now.Sub(l.told[l.tolds[0]]) >= allowEvery {
		l.untell()
	}
	if _, ok := l.told[key]; ok {
		return false
	}
	if len(l.tolds) >= maxSeen {
		l.untell()
	}
	l.told[key] = now
	l.tolds = append(l.tolds, key)
	return true
}

// untell forgets the oldest answered name.
func (l *ledger) untell() {
	delete(l.told, l.tolds[0])
	l.tolds[0] = asked{}
	l.tolds = l.tolds[1:]
}

// unfirst takes back what first has just noted: the record was not written.
func (l *ledger) unfirst() {
	last := len(l.tolds) - 1
	delete(l.told, l.tolds[last])
	l.tolds[last] = asked{}
	l.tolds = l.tolds[:last]
}

func recordOf(a asking, n uint64) *audit.Record {
	r := &audit.Record{
		Kind: audit.KindName, Decision: audit.Allow, Reason: a.e.reason, Rule: a.e.rule, Dir: string(mesh.Out),
		Src: a.who.String(), Dst: "host:" + a.e.name, Revision: a.e.zone.set.Revision(),
	}
	if a.from.IsValid() {
		r.Peer = a.from.String()
	}
	if a.e.absent {
		r.Decision, r.Detail = audit.Deny, a.e.text
		if n > 1 {
			r.Detail += fmt.Sprintf("; asked %d times", n)
		}
	}
	return r
}
