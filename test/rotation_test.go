package test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/control"
	"sallyport/internal/meshtest"
)

// TestRotation replaces the root of a running mesh under load: with the issuer
// killed in between, and then in an emergency.
func TestRotation(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, 10*time.Second)
	w.write("issuer", fmt.Sprintf(`trust_domain: %s
data_dir: %s/issuer
listen: %s
policies: %s
ca: {x509_ttl: 10s, jwt_ttl: 2s, agent_ttl: 30s, allow_short_ttl: true}
`, trustDomain, w.dir, w.issuer, w.policy))
	issuer := w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	w.startNode(bill)
	payment := w.startNode(pay)
	const url = "http://billing.mesh.internal/v1/charges"
	w.awaitReach(payment, url)

	first := w.roots()
	if first.Phase != "steady" || len(first.Authorities) != 2 {
		t.Fatalf("at first: %+v", first)
	}
	ended := payment.keepsCalling(t, url)
	w.moves(t, "prepared", "ca", "rotate")
	issuer.kill()
	w.startIssuer()
	if st := w.roots(); st.Phase != "prepared" {
		t.Errorf("after the crash: %+v", st)
	}
	w.await("reach the next gate", func() bool { st := w.roots(); return st.Known && st.Live == 2 && st.Confirmed == 2 })
	// It goes on by itself, and may have done so before it is told.
	w.moves(t, "activated tainted steady", "ca", "rotate", "--through")
	w.awaitRoot(first)
	t.Logf("root replaced, issuer killed once: %d requests made", ended())

	second := w.roots()
	w.moves(t, "tainted", "ca", "rotate", "--emergency")
	w.awaitRoot(second)
	w.awaitReach(payment, url)
	if r := w.sallyport("ca", "rollback"); r.Code != 1 {
		t.Errorf("rollback of nothing: %d %s", r.Code, r.Output)
	}
}

func (w *world) roots() (st control.RootStatus) {
	w.t.Helper()
	r := w.sallyport("ca", "status", "-o", "json")
	if r.Code != 0 {
		w.t.Fatalf("ca status: %s", r.Output)
	}
	if err := json.Unmarshal([]byte(r.Output), &st); err != nil {
		w.t.Fatalf("ca status: %v\n%s", err, r.Output)
	}
	return st
}

// moves runs a command that leads to a phase, one of those named.
func (w *world) moves(t *testing.T, phases string, args ...string) {
	t.Helper()
	r := w.sallyport(append(args, "-o", "json")...)
	var st control.RootStatus
	if err := json.Unmarshal([]byte(r.Output), &st); r.Code != 0 || err != nil || !slices.Contains(strings.Fields(phases), string(st.Phase)) {
		t.Fatalf("%v: status %d, want phase %s:\n%s", args, r.Code, phases, r.Output)
	}
}

// awaitRoot waits until the rotation has ended with another root than before.
func (w *world) awaitRoot(before control.RootStatus) {
	w.t.Helper()
	w.await("end the rotation", func() bool { return w.roots().Phase == "steady" })
	if now := w.roots(); now.Authorities[0].ID == before.Authorities[0].ID {
		w.t.Errorf("the root is the old one: %+v", now)
	}
}

// keepsCalling has a workload call url again and again. Each failure is an error
// of the test; ended stops it, and says how often it called.
func (h *hand) keepsCalling(t *testing.T, url string) (ended func() int) {
	made, stop, stopped := 0, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for ; ; made++ {
			select {
			case <-stop:
				return
			default:
			}
			if r := ask[runReply](h, "/run", []string{"curl", "-sS", "-f", "--max-time", "10", url}); r.Code != 0 {
				t.Errorf("a call failed: %s", r.Output)
			}
		}
	}()
	halt := sync.OnceFunc(func() { close(stop); <-stopped })
	t.Cleanup(halt) // when the test fails before it
	return func() int {
		halt()
		return made
	}
}
