package tap

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// ledger is a Recorder.
type ledger struct {
	mu   sync.Mutex
	recs []audit.Record
	fail error
}

func (l *ledger) Append(r *audit.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return l.fail
	}
	l.recs = append(l.recs, *r)
	return nil
}

// Who does not take the calls holds nobody up: what there is no room for is counted,
// and the next call says how many.
func TestNobodyWaitsForWhoLooks(t *testing.T) {
	var taps Taps
	seen := func() *mesh.Tapped { return &mesh.Tapped{Reporter: "outbound", Status: 200} }
	rest := 0
	fill := func(*mesh.Tapped) { rest++ }
	(*Taps)(nil).Show(seen(), fill)
	taps.Show(seen(), fill)
	if rest != 0 || taps.Watched() || (*Taps)(nil).Watched() {
		t.Fatal("calls are looked at that nobody looks at")
	}
	slow, _ := taps.Open(mesh.TapFilter{Reporter: "outbound"})
	never, _ := taps.Open(mesh.TapFilter{Status: "418"})
	for range 2 {
		if _, ok := taps.Open(mesh.TapFilter{Status: "418"}); !ok {
			t.Fatal("not as many may look as should")
		}
	}
	if _, fifth := taps.Open(mesh.TapFilter{}); fifth {
		t.Fatal("one too many looks")
	}
	for range tapRoom + 5 {
		taps.Show(seen(), fill)
	}
	if rest != tapRoom || len(never.Calls) != 0 {
		t.Errorf("the rest of %d calls was asked for, want %d; a filter that nothing meets sees %d", rest, tapRoom, len(never.Calls))
	}
	for range tapRoom {
		if c := <-slow.Calls; c.Missed != 0 {
			t.Fatalf("%d missed before any was", c.Missed)
		}
	}
	taps.Show(seen(), fill)
	if last := <-slow.Calls; last.Missed != 5 {
		t.Errorf("%d calls were missed, want 5", last.Missed)
	}
	taps.Close(slow)
	taps.Show(seen(), fill)
	if len(slow.Calls) != 0 {
		t.Error("who has left still sees calls")
	}
}

func TestFieldsHideWhatCouldBeSecret(t *testing.T) {
	of := []http1.Field{{Name: []byte("Authorization"), Value: []byte("Bearer x")}, {Name: []byte("ACCEPT"), Value: []byte("*/*")}, {Name: []byte("X-Own"), Value: []byte("x")}}
	got := Fields(of)
	want := [][2]string{{"Authorization", "[hidden]"}, {"ACCEPT", "*/*"}, {"X-Own", "[hidden]"}}
	if len(got) != len(want) {
		t.Fatal(got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%q, want %q", got[i], want[i])
		}
	}
	if n := len(Fields(make([]http1.Field, 200))); n != maxFields {
		t.Errorf("%d fields are shown", n)
	}
}

// What cannot be recorded is not shown, whatever way.
func TestNothingIsShownUnrecorded(t *testing.T) {
	var taps Taps
	l := &ledger{fail: errors.New("disk full")}
	err := taps.Passer(l)(t.Context(), control.Look{By: "spiffe://corp.example/ops", Show: func([]*mesh.Tapped) error {
		t.Error("something is shown")
		return nil
	}})
	if !errors.Is(err, errUnrecorded) || taps.Watched() {
		t.Errorf("%v, watched %t", err, taps.Watched())
	}
	// Whom nobody knows sees nothing either, nor who asks for what there is not.
	for query, want := range map[string]int{"": http.StatusForbidden, "status=5x": http.StatusBadRequest} {
		w := httptest.NewRecorder()
		taps.Handler(&ledger{}).ServeHTTP(w, httptest.NewRequest("GET", "/tap?"+query, nil))
		if w.Code != want {
			t.Errorf("%q is answered %d %s, want %d", query, w.Code, w.Body, want)
		}
	}
}

// Calls go to the issuer a few at a time, however many there are, and who looks is
// in the audit before the first.
func TestPasserKeepsItsPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var taps Taps
		var l ledger
		sent := make(chan int, 100)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- taps.Passer(&l)(ctx, control.Look{By: "spiffe://corp.example/ops", Filter: mesh.TapFilter{Status: "5xx"}, Show: func(list []*mesh.Tapped) error {
				sent <- len(list)
				return nil
			}})
		}()
		if n := <-sent; n != 0 {
			t.Fatalf("it begins with %d calls", n)
		}
		if len(l.recs) != 1 || l.recs[0].Peer != "spiffe://corp.example/ops" || l.recs[0].Verb != "tap" || !strings.Contains(l.recs[0].Detail, "through the issuer") || !strings.Contains(l.recs[0].Detail, "status=5xx") {
			t.Errorf("recorded %+v", l.recs)
		}
		for range 1000 {
			taps.Show(&mesh.Tapped{Status: 503}, nil)
		}
		for range 8 {
			if n := <-sent; n != maxGathered {
				t.Errorf("%d calls are sent at once", n)
			}
		}
		taps.Show(&mesh.Tapped{Status: 503}, nil)
		if n := <-sent; n != 1 {
			t.Errorf("%d calls are sent", n)
		}
		cancel()
		if err := <-done; err != nil || taps.Watched() {
			t.Errorf("%v, watched %t", err, taps.Watched())
		}
	})
}

// Who looks through the issuer leaves a place to the proxy's own machine, and begins
// no more than one look a second: none other is recorded.
func TestLooksFromAfarAreHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var taps Taps
		var l ledger
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		look := func() (end chan error) {
			end = make(chan error, 1)
			go func() {
				end <- taps.Passer(&l)(ctx, control.Look{By: "spiffe://corp.example/ops", Show: func([]*mesh.Tapped) error { return nil }})
			}()
			synctest.Wait()
			return end
		}
		for n := range maxTaps - 1 {
			look()
			if err := <-look(); !errors.Is(err, errHasty) && n < maxTaps-2 || len(l.recs) != n+1 {
				t.Errorf("another at once: %v, %d records", err, len(l.recs))
			}
			time.Sleep(afarGap)
		}
		if err := <-look(); !errors.Is(err, errCrowded) || len(l.recs) != maxTaps-1 {
			t.Errorf("one too many: %v, %d records", err, len(l.recs))
		}
		if _, ok := taps.Open(mesh.TapFilter{}); !ok {
			t.Error("no place is left for the machine itself")
		}
		cancel()
		synctest.Wait()
	})
}
