package nameserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
)

// TestRate has a workload ask more than it may in a second, which is no other's
// loss, and is told once.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Rate = 4 })
		one, more, other := r.answerer(payment, 64), r.answerer(payment, 64), r.answerer(web, 64)
		may := func(a *answerer) (n int) {
			for range 10 {
				if a.may() {
					n++
				}
			}
			return n
		}
		if n := may(one); n != 4 {
			t.Errorf("%d questions at once, want 4", n)
		}
		if n := may(more); n != 0 {
			t.Errorf("%d questions more by another socket", n)
		}
		if n := may(other); n != 4 {
			t.Errorf("%d questions of another workload, want 4", n)
		}
		time.Sleep(250 * time.Millisecond)
		if n := may(one); n != 1 {
			t.Errorf("%d questions after a quarter of a second, want 1", n)
		}
		time.Sleep(time.Hour)
		if n := may(one); n != 4 {
			t.Errorf("%d questions at once after an hour, want 4", n)
		}
		r.tellBeyond()
		told := map[string]string{}
		for _, rec := range r.records {
			told[rec.Src] += rec.Reason + ": " + rec.Detail
		}
		if got, want := told[payment.String()], "rate: 31 questions beyond what it may ask in a second got no answer"; got != want || len(told) != 2 {
			t.Errorf("recorded %v, want %q", told, want)
		}
	})
}

// TestNamesBeyondABudgetAreToldOnce in an hour, with how often they were asked for.
func TestNamesBeyondABudgetAreToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			c.Real = func(context.Context, spiffeid.ID, string) ([]netip.Addr, time.Duration, error) {
				return nil, 0, ErrBudget
			}
		})
		r.zone.Load().real = []string{"real.example.com", "api.example.com"}
		began := time.Now()
		asks := func(name string, n int) {
			for range n { // each by another connection
				_, _ = r.answerer(payment, 1).answer(t.Context(), pack(t, ask(name, dns.TypeA, 1232)), false)
				r.tell()
			}
		}
		told := func(want ...string) {
			t.Helper()
			r.mu.Lock()
			defer r.mu.Unlock()
			var got []string
			for _, rec := range r.records {
				if rec.Decision != audit.Deny || rec.Reason != string(Invented) {
					t.Errorf("recorded %+v", rec)
				}
				got = append(got, rec.Dst+strings.TrimPrefix(rec.Detail, "budget.names of the destination is used up"))
			}
			if r.records = nil; !slices.Equal(got, want) {
				t.Errorf("recorded %q, want %q", got, want)
			}
		}
		asks("real.example.com.", 5)
		asks("api.example.com.", 1)
		told("host:real.example.com", "host:api.example.com")
		time.Sleep(overEvery - time.Second)
		asks("api.example.com.", 2)
		r.tellRefused(false)
		told()
		time.Sleep(time.Second)
		r.tellRefused(false)
		since := began.UTC().Format(time.RFC3339)
		told("host:real.example.com; asked 4 times more since "+since, "host:api.example.com; asked 2 times more since "+since)
		asks("real.example.com.", 2)
		told("host:real.example.com")
		r.tellRefused(true) // it stops
		told("host:real.example.com; asked 1 times more since " + time.Now().UTC().Format(time.RFC3339))
		for n := range maxOver + 2 {
			r.zone.Load().real = []string{fmt.Sprintf("n%d.wild.example.com", n)}
			asks(fmt.Sprintf("n%d.wild.example.com.", n), 1)
		}
		if len(r.again) != maxOver || len(r.repeated) != len(r.again) {
			t.Errorf("%d and %d names are remembered", len(r.again), len(r.repeated))
		}
	})
}

// TestNamesWhoseRecordFailsAreToldAgain with the next question.
func TestNamesWhoseRecordFailsAreToldAgain(t *testing.T) {
	var fails bool
	var told []string
	r := newRig(t, func(c *Config) {
		c.Record = func(rec *audit.Record) error {
			if fails {
				return errors.New("the disk is full")
			}
			told = append(told, rec.Dst)
			return nil
		}
	})
	for _, tt := range []struct {
		result Result
		name   string
	}{{Invented, "over.example.com"}, {Allowed, "api.example.com"}} {
		told = nil
		a := asking{who: payment, e: &entry{meaning: &meaning{name: tt.name, result: tt.result, absent: tt.result == Invented}, zone: r.zone.Load()}}
		for _, fails = range []bool{true, false, false} {
			a.e.asked.Store(1)
			r.waiting = append(r.waiting, a)
			r.tell()
		}
		if want := []string{"host:" + tt.name}; !slices.Equal(told, want) {
			t.Errorf("recorded %q, want %q", told, want)
		}
	}
}

// TestOfAnsweredNamesTheOldestIsForgotten when there are too many.
func TestOfAnsweredNamesTheOldestIsForgotten(t *testing.T) {
	r := newRig(t, nil)
	first := func(n int) bool {
		return r.first(asking{who: payment, e: &entry{meaning: &meaning{name: fmt.Sprintf("n%d.test", n)}}})
	}
	for n := range maxSeen + 1 {
		if !first(n) {
			t.Fatalf("name %d is known", n)
		}
	}
	if len(r.ledger.told) != maxSeen || len(r.tolds) != maxSeen {
		t.Errorf("%d and %d names are remembered", len(r.ledger.told), len(r.tolds))
	}
	if first(1) || first(maxSeen) || !first(0) {
		t.Error("another than the oldest was forgotten")
	}
}

// TestWhoAsksIsRecorded has the record of a name say from where it was asked for.
func TestWhoAsksIsRecorded(t *testing.T) {
	r := newRig(t, nil)
	from := netip.MustParseAddrPort("127.0.0.1:40000")
	a := r.answerer(payment, 64)
	a.from = func() netip.AddrPort { return from }
	b := make([]byte, room)
	if size, _ := a.quick(b, copy(b, pack(t, ask("evil.test.", dns.TypeA, 1232)))); size == 0 {
		t.Fatal("not answered")
	}
	a = r.answerer(web, 64)
	a.at(net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:40001")))
	if size, _ := a.quick(b, copy(b, pack(t, ask("evil.test.", dns.TypeA, 1232)))); size == 0 {
		t.Fatal("not answered")
	}
	r.tell()
	if len(r.records) != 2 || r.records[0].Peer != from.String() || r.records[1].Peer != "127.0.0.1:40001" {
		t.Errorf("recorded %+v", r.records)
	}
}
