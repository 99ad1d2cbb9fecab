package proxy

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

// TestSettledCallIsOver looks at the way out between the calls of a connection
// that stays open: a call whose answer went out where it was read is over with
// its answer, not with the next request.
func TestSettledCallIsOver(t *testing.T) {
	r := newRig(t, app(t, hello))
	w := r.dial()
	for i := range 20 {
		w.say(fmt.Sprintf("GET /ok/%d HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n", i))
		if _, body := w.answer("GET"); body != fmt.Sprintf("hello /ok/%d", i) {
			t.Fatalf("got %q", body)
		}
		r.outbound.mu.Lock()
		d := r.outbound.doors[0]
		r.outbound.mu.Unlock()
		await(t, func() bool { return d.inFlight.Load() == 0 })
		for _, c := range d.conns() {
			await(t, func() bool { return c.state.Load() == idle && c.look().up == nil })
		}
	}
	// Two at once come one after the other, whoever brings the first answer.
	one := "GET /ok/a HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n"
	for range 20 {
		w.say(one + strings.ReplaceAll(one, "/a", "/b"))
		for _, name := range []string{"a", "b"} {
			if _, body := w.answer("GET"); body != "hello /ok/"+name {
				t.Fatalf("got %q, want that of %s", body, name)
			}
		}
	}
	if n := len(decisions(r.inAudit)); n != 60 {
		t.Errorf("%d calls were judged, want 60", n)
	}
}

// TestBadAnswersAreForTheCall keeps what is told of a service that fails away
// from who reads for many: a log may have to be waited for.
func TestBadAnswersAreForTheCall(t *testing.T) {
	var answer atomic.Int32
	r := newParts(t, app(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(int(answer.Load())) }), func(r *rig) {
		r.routes = "service: billing\nroutes: [{name: all, retry: {attempts: 0}}]\n"
	})
	var settles atomic.Bool
	d := newDoor(r.outbound, "")
	d.accepts = func(x *call) bool {
		ok := d.accept(x)
		settles.Store(x.ex.Settle != nil)
		return ok
	}
	r.inAddr, _ = start(t, r.inbound.Run)
	r.outAddr, _ = start(t, d.run)
	r.use(r.access)
	w := r.dial()
	for _, code := range []int{200, 503, 404, 429, 500, 200} {
		answer.Store(int32(code))
		w.say("GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
		if resp, _ := w.answer("GET"); resp.StatusCode != code {
			t.Fatalf("got %s, want %d", resp.Status, code)
		}
		if settles.Load() != (code < 429) {
			t.Errorf("%d is settled where it is read: %v", code, settles.Load())
		}
	}
}

// TestPanicGivesBackWhatWasLent has a service take one call at a time: one that
// panics must not count for ever.
func TestPanicGivesBackWhatWasLent(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer func(w http.ResponseWriter, r *http.Request)
		arm    func(d *door, mistake func())
	}{
		{"where the answer is read", hello, accepting},
		{"in the call", func(w http.ResponseWriter, r *http.Request) {
			hello(w, r)
			_ = http.NewResponseController(w).Flush() // chunks are for the call
		}, accepting},
		{"once it was given back", hello, func(d *door, mistake func()) {
			leave := d.chain[2].leave
			d.chain[2].leave = func(x *call) {
				mistake()
				leave(x)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newParts(t, app(t, tt.answer), func(r *rig) { r.routes = "service: billing\ncapacity: {calls: 1}\n" })
			var armed atomic.Bool
			d := newDoor(r.outbound, "")
			tt.arm(d, func() {
				if armed.Swap(false) {
					panic("a mistake of ours")
				}
			})
			r.inAddr, _ = start(t, r.inbound.Run)
			r.outAddr, _ = start(t, d.run)
			r.use(r.access)
			for range 3 {
				armed.Store(true)
				w := r.dial()
				w.say("GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
				if got := w.ended(); strings.Contains(got, "capacity") {
					t.Fatalf("a call got %q", got)
				}
				await(t, func() bool { return d.inFlight.Load() == 0 })
				w = r.dial()
				w.say("GET /ok/2 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
				if resp, body := w.answer("GET"); body != "hello /ok/2" {
					t.Fatalf("the next call got %s %q", resp.Status, body)
				}
				await(t, func() bool { return d.inFlight.Load() == 0 })
			}
			if n := d.panics.Load(); n != 3 {
				t.Errorf("%d panics, want 3", n)
			}
		})
	}
}

// accepting has a mistake made of an answer that is whole or to come.
func accepting(d *door, mistake func()) {
	d.accepts = func(x *call) bool {
		mistake()
		return d.accept(x)
	}
}
