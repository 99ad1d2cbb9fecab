package proxy

import (
	"fmt"
	"strings"
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
