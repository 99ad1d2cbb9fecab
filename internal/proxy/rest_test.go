package proxy

import (
	"strconv"
	"testing"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

// restless is a rig in which connections of peers come to rest at once, and may
// wait for so long.
func restless(t *testing.T, idle time.Duration) *rig {
	r := newParts(t, app(t, hello), func(r *rig) { r.inCfg.Limits = http1.Limits{IdleTimeout: idle} })
	r.inbound.restAfter, r.inbound.verifyEvery = time.Millisecond, 0
	return r.open()
}

// awaitRest waits until so many connections and streams are at rest.
func (r *rig) awaitRest(n int) {
	r.t.Helper()
	await(r.t, func() bool {
		return r.metric(`sallyport_connections{reporter="inbound",state="resting"}`) == strconv.Itoa(n)
	})
}

func TestCallsOfAConnectionThatWasAtRest(t *testing.T) {
	r := restless(t, time.Minute)
	w := r.dialIn(r.web)
	r.awaitRest(1) // before the first call
	for range 3 {
		w.say(okRequest)
		if resp, body := w.answer("GET"); resp.StatusCode != 200 || body != "hello /ok/1" {
			t.Fatalf("got %s: %s", resp.Status, body)
		}
		r.awaitRest(1)
	}
	w.say(okRequest + okRequest) // the second is at hand when the first is over
	for range 2 {
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
			t.Fatalf("got %s", resp.Status)
		}
	}
	r.awaitRest(1)
	if n := len(decisions(r.inAudit)); n != 5 {
		t.Errorf("%d calls were judged, want 5", n)
	}
	w.say("nonsense\r\n\r\n")
	if resp, _ := w.answer("GET"); resp.StatusCode != 400 {
		t.Errorf("got %s", resp.Status)
	}
	w.ended()
	await(t, func() bool { return r.inbound.Carries() == 0 })
}

// A stream of a hop comes to rest by itself.
func TestCallsOfAStreamThatWasAtRest(t *testing.T) {
	r := restless(t, time.Minute)
	c := r.client()
	for range 3 {
		if resp, body := get(t, c, "http://billing.mesh.internal/ok/1"); resp.StatusCode != 200 {
			t.Fatalf("got %s: %s", resp.Status, body)
		}
		r.awaitRest(1)
	}
}

func TestAConnectionAtRestEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(r *rig, w *wire)
	}{
		{"when its peer closes it", func(_ *rig, w *wire) { w.Close() }},
		{"when its peer is revoked", func(r *rig, _ *wire) {
			r.billing.Revoke(revocationOf(r.web))
			r.inbound.Rejudge()
		}},
		{"when its peer may call nothing any more", func(r *rig, _ *wire) {
			r.use("")
			r.inbound.Rejudge()
		}},
		{"in a drain", func(r *rig, _ *wire) {
			if err := r.stopIn(); err != nil {
				r.t.Error(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := restless(t, time.Minute)
			w := r.dialIn(r.web)
			w.say(okRequest)
			w.answer("GET")
			r.awaitRest(1)
			tt.end(r, w)
			await(t, func() bool { return r.inbound.Carries() == 0 })
			r.awaitRest(0)
		})
	}
	t.Run("when it has waited for too long", func(t *testing.T) {
		r := restless(t, 50*time.Millisecond)
		if rest := r.dialIn(r.web).ended(); rest != "" {
			t.Errorf("it got %q", rest)
		}
	})
}

// What changes while a connection is at rest holds for its next call.
func TestWhatChangesWhileAConnectionIsAtRest(t *testing.T) {
	for _, tt := range []struct {
		name, reason string
		change       func(r *rig)
	}{
		{"the policy", "no_row", func(r *rig) {
			r.use("p, other, in, " + web.String() + ", " + billing.String() + ", 8443, GET, /other/**, -, allow\n")
			r.inbound.Rejudge() // which leaves the connection, since the peer may call something
		}},
		{"the root that the peer was proved by", "svid_invalid", func(r *rig) {
			other := meshtest.NewCA(t, meshtest.TD)
			if err := r.billing.Set(&svid.State{Identities: []svid.Identity{other.Issue(t, billing, time.Hour)}, Bundle: other.Bundle()}); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := restless(t, time.Minute)
			w := r.dialIn(r.web)
			w.say(okRequest)
			w.answer("GET")
			r.awaitRest(1)
			tt.change(r)
			w.say(okRequest)
			resp, body := w.answer("GET")
			denied(t, resp, body, r.inAudit, tt.reason)
		})
	}
}
