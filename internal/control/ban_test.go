package control

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// A deaf registry holds what it no longer hears of.
type deaf struct {
	*memory
	held mesh.Agent
}

func (d *deaf) HeldAgent(context.Context, spiffeid.ID) (mesh.Agent, error) {
	return read(d.memory, func() mesh.Agent { return d.held }), nil
}

// TestABanElsewhereIsSeenWithinARefresh though this issuer does not hear of what
// the others write.
func TestABanElsewhereIsSeenWithinARefresh(t *testing.T) {
	r := newRig(t, newCA(t, td))
	d := &deaf{memory: r.reg}
	r.retune(func(s *Server) { s.lease = 30 * time.Millisecond }, func(c *ServerConfig) { c.Registry = d })
	c, _ := r.joined("node-b")
	id := agentID("node-b")
	r.reg.change(func() { d.held = r.reg.agents[id] })
	w := newWatcher()
	ended, _ := subscribe(t, c, billingHello(), w)
	recv(t, "first sync", w.syncs)
	r.reg.mu.Lock()
	r.reg.agents[id] = mesh.Agent{ID: id, Serial: d.held.Serial, Banned: true}
	r.reg.mu.Unlock()
	if err := recv(t, "end of the subscription", ended); !errors.Is(err, ErrBanned) {
		t.Errorf("Subscribe ended with %v, want ErrBanned", err)
	}
}

// TestAttestingAgainEndsTheStreamsBefore: whoever holds the SVID before is
// refused at once, and not when the next change wakes its stream.
func TestAttestingAgainEndsTheStreamsBefore(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	w := newWatcher()
	ended, _ := subscribe(t, c, billingHello(), w)
	recv(t, "snapshot", w.snaps)
	r.joined("node-b")
	if err := recv(t, "end of the subscription", ended); !errors.Is(err, ErrMustReattest) {
		t.Errorf("Subscribe ended with %v, want ErrMustReattest", err)
	}
}

// A contested registry has every write of an agent find another's before it.
type contested struct {
	*memory
	left atomic.Int32
	ban  atomic.Bool
}

func (c *contested) PutAgent(ctx context.Context, a mesh.Agent) error {
	if c.left.Add(-1) >= 0 {
		c.memory.mu.Lock()
		other := c.memory.agents[a.ID]
		other.Revision++
		other.Banned = c.ban.Load()
		c.memory.agents[a.ID] = other
		c.memory.mu.Unlock()
	}
	return c.memory.PutAgent(ctx, a)
}

// TestAWriteOfAnAgentLosesNoBan though another issuer bans between the look and
// the write of this one.
func TestAWriteOfAnAgentLosesNoBan(t *testing.T) {
	g := &contested{}
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		g.memory = c.Registry.(*memory)
		c.Registry = g
	})
	c, h := r.joined("node-b")
	g.left.Store(1)
	if _, err := c.Renew(t.Context(), newKey(t)); !errors.Is(err, ErrFailed) {
		t.Errorf("renewal against a write: %v, want ErrFailed", err)
	}
	key := newKey(t)
	svid, err := c.Renew(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	h.set(pair(svid, key))
	g.left.Store(2)
	if _, err := c.SyncEntries(t.Context()); err != nil {
		t.Errorf("first use of a renewed SVID against writes: %v", err)
	}
	g.ban.Store(true)
	g.left.Store(1)
	if _, err := c.Renew(t.Context(), newKey(t)); !errors.Is(err, ErrFailed) {
		t.Errorf("renewal against a ban: %v, want ErrFailed", err)
	}
	if _, err := c.Renew(t.Context(), newKey(t)); !errors.Is(err, ErrBanned) {
		t.Errorf("renewal after a ban: %v, want ErrBanned", err)
	}
	if !read(r.reg, func() bool { return r.reg.agents[agentID("node-b")].Banned }) {
		t.Error("the ban is lost")
	}
}

// TestWhoIsBannedWhileItsSVIDIsRecordedGetsNone: what was revoked by the ban is
// what was recorded before.
func TestWhoIsBannedWhileItsSVIDIsRecordedGetsNone(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	bans := func(name string) {
		r.reg.change(func() {
			r.reg.onIssued = func() error {
				r.reg.change(func() {
					a := r.reg.agents[agentID(name)]
					a.Banned = true
					r.reg.agents[agentID(name)] = a
				})
				return nil
			}
		})
	}
	bans("node-b")
	if _, err := c.Renew(t.Context(), newKey(t)); !errors.Is(err, ErrBanned) {
		t.Errorf("renewal: %v, want ErrBanned", err)
	}
	bans("node-c")
	if _, err := r.client(&holder{}).Attest(t.Context(), "join_token", []byte("node-c"), newKey(t)); !errors.Is(err, ErrBanned) {
		t.Errorf("attestation: %v, want ErrBanned", err)
	}
}
