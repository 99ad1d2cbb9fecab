package control

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// wait bounds what a test waits for; nothing that passes comes near it.
const wait = time.Minute

func recv[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(wait):
		t.Fatalf("no %s within %s", what, wait)
		panic("unreachable")
	}
}

// watcher is a Handler.
type watcher struct {
	snaps chan *mesh.Snapshot
	syncs chan struct{}
	// refuse, when it returns an error, rejects a snapshot.
	refuse func(*mesh.Snapshot) error
	// try, when set, is given the candidate.
	try func(*mesh.Snapshot) error
	// revoked, when set, is given what is revoked.
	revoked chan []mesh.RevokedSVID
}

func (w *watcher) OnSnapshot(_ context.Context, s *mesh.Snapshot) error {
	if w.refuse != nil {
		if err := w.refuse(s); err != nil {
			return err
		}
	}
	w.snaps <- s
	return nil
}

func (w *watcher) OnCandidate(_ context.Context, rows *mesh.Snapshot) error {
	if w.try == nil {
		return nil
	}
	return w.try(rows)
}

func (w *watcher) OnSyncNow(context.Context) { w.syncs <- struct{}{} }

func (w *watcher) OnRevoked(_ context.Context, list []mesh.RevokedSVID) {
	if w.revoked != nil {
		w.revoked <- list
	}
}

func newWatcher() *watcher {
	return &watcher{snaps: make(chan *mesh.Snapshot, 64), syncs: make(chan struct{}, 64)}
}

// subscribe runs Subscribe until the test ends or stop is called.
func subscribe(t *testing.T, c *Client, h Hello, w *watcher) (ended <-chan error, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	left := make(chan struct{})
	go func() {
		defer close(left)
		done <- c.Subscribe(ctx, h, w)
	}()
	stop = func() {
		cancel()
		<-left
	}
	t.Cleanup(stop)
	return done, stop
}

// report waits for a report of a proxy that fits.
func report(t *testing.T, r *rig, what string, fits func(mesh.Proxy) bool) mesh.Proxy {
	t.Helper()
	for {
		if p := recv(t, "report: "+what, r.reg.reported); fits(p) {
			return p
		}
	}
}

func billingHello() Hello {
	return Hello{
		Kind: KindSidecar, Workload: billing,
		Endpoints:   []mesh.Endpoint{{Service: "billing", Address: netip.MustParseAddrPort("127.0.0.1:15006")}},
		SVIDExpires: func() time.Time { return time.Unix(2e9, 0) },
	}
}

// TestCanarySubscriber is told of what its group tries, and of it alone.
func TestCanarySubscriber(t *testing.T) {
	r := newRig(t, newCA(t, td))
	canary, _ := r.joined("node-b")
	other, _ := r.joined("node-a")
	first, second := newWatcher(), newWatcher()
	_, stop := subscribe(t, canary, billingHello(), first)
	defer stop()
	_, stopOther := subscribe(t, other, Hello{Kind: KindSidecar, Workload: payment}, second)
	defer stopOther()
	recv(t, "snapshot", first.snaps)
	recv(t, "snapshot", second.snaps)
	r.reg.change(func() { r.reg.canary, r.reg.tried = billing, snapshot(t, 11, 4, "PUT") })
	if got := recv(t, "the snapshot that is tried", first.snaps); got.PolicyRevision != 4 {
		t.Errorf("the canary is told of revision %d", got.PolicyRevision)
	}
	report(t, r, "ack of the canary", func(p mesh.Proxy) bool { return p.Workload == billing && p.PolicyRevision == 4 })
	// What comes next for all is the first that the other hears.
	r.reg.change(func() { r.reg.tried, r.reg.snap = nil, snapshot(t, 12, 5, "GET|POST") })
	for who, w := range map[string]*watcher{"the canary": first, "the other": second} {
		if got := recv(t, "the snapshot of all", w.snaps); got.PolicyRevision != 5 {
			t.Errorf("%s is told of revision %d", who, got.PolicyRevision)
		}
	}
}

func TestASubscriberGetsItsSliceAndAnswers(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	w := newWatcher()
	up := make(chan error, 8)
	h := billingHello()
	h.OnState = func(err error) { up <- err }
	_, stop := subscribe(t, c, h, w)
	if err := recv(t, "state", up); err != nil {
		t.Fatal(err)
	}
	recv(t, "sync on connecting", w.syncs)
	got := recv(t, "snapshot", w.snaps)
	if got.Revision != 10 || len(got.Rules) != 2 || got.ContentHash() != r.reg.Current().Project(billing).ContentHash() {
		t.Errorf("snapshot %d with %d rules", got.Revision, len(got.Rules))
	}
	p := report(t, r, "ack", func(p mesh.Proxy) bool { return p.PolicyRevision == 3 })
	if !p.Connected || p.Agent != agentID("node-b") || p.Kind != KindSidecar || !p.SVIDExpires.Equal(time.Unix(2e9, 0)) {
		t.Errorf("reported %+v", p)
	}
	e := mesh.Endpoint{Service: "billing", Address: netip.MustParseAddrPort("127.0.0.1:15006"), Agent: agentID("node-b")}
	if n := read(r.reg, func() int { return r.reg.announced[e] }); n != 1 {
		t.Errorf("endpoint announced %d times, want once", n)
	}
	// A change of what billing sees is sent; one that it does not see is told
	// by its numbers alone.
	t0 := time.Now()
	r.reg.change(func() { r.reg.snap = snapshot(t, 11, 4, "GET|POST") })
	if got := recv(t, "new snapshot", w.snaps); got.Revision != 11 || got.PolicyRevision != 4 {
		t.Errorf("snapshot of revision %d, policy %d", got.Revision, got.PolicyRevision)
	}
	if d := time.Since(t0); d > 20*time.Second {
		t.Errorf("push took %s", d)
	}
	r.reg.change(func() {
		s := *snapshot(t, 12, 5, "GET|POST")
		s.PolicyHash = "another"
		r.reg.snap = &s
	})
	if got := recv(t, "renumbered snapshot", w.snaps); got.Revision != 12 || got.PolicyRevision != 5 || got.PolicyHash != "another" || len(got.Rules) != 2 {
		t.Errorf("renumbered: %d %d %s", got.Revision, got.PolicyRevision, got.PolicyHash)
	}
	report(t, r, "ack of 5", func(p mesh.Proxy) bool { return p.PolicyRevision == 5 })
	stop()
	report(t, r, "leaving", func(p mesh.Proxy) bool { return !p.Connected })
	if got := recv(t, "withdrawal", r.reg.withdrawn); got != agentID("node-b") {
		t.Errorf("withdrawn %s", got)
	}
}

func TestAProjectionIsMadeOnce(t *testing.T) {
	var p projections
	snap := snapshot(t, 1, 1, "GET")
	a, err := p.of(snap, KindSidecar, billing)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := p.of(snap, KindSidecar, billing)
	if a != b {
		t.Error("one workload's projection was made twice")
	}
	if other, _ := p.of(snap, KindSidecar, payment); other == a || bytes.Equal(other.msg.Body, a.msg.Body) {
		t.Error("payment got billing's projection")
	}
	g1, _ := p.of(snap, KindGateway, egress)
	if g2, _ := p.of(snap, KindGateway, billing); g1 != g2 {
		t.Error("two gateways have two projections")
	}
	next := snapshot(t, 2, 2, "GET")
	n, _ := p.of(next, KindSidecar, billing)
	if n.msg.Hash != a.msg.Hash || n.msg.Revision != 2 {
		t.Error("the same content under a new revision has another hash")
	}
	if late, _ := p.of(snap, KindSidecar, billing); late.msg.Revision != 1 {
		t.Error("a late reader got another snapshot")
	}
	if again, _ := p.of(next, KindSidecar, billing); again != n {
		t.Error("a late reader displaced the newest projection")
	}
}

func TestARejectedSnapshotIsTold(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	w := newWatcher()
	w.refuse = func(s *mesh.Snapshot) error {
		if s.PolicyRevision == 4 {
			return errors.New("row pay-bill: verb\nis odd")
		}
		return nil
	}
	subscribe(t, c, billingHello(), w)
	recv(t, "snapshot", w.snaps)
	r.reg.change(func() { r.reg.snap = snapshot(t, 11, 4, "PATCH") })
	p := report(t, r, "nack", func(p mesh.Proxy) bool { return p.State == mesh.Rejected })
	if p.PolicyRevision != 4 || p.Reason != "row pay-bill: verb is odd" || !p.Connected {
		t.Errorf("reported %+v", p)
	}
	// The rejected content under a new number is rejected still.
	r.reg.change(func() { s := *r.reg.snap; s.Revision = 12; r.reg.snap = &s })
	report(t, r, "second nack", func(p mesh.Proxy) bool { return p.State == mesh.Rejected })
	r.reg.change(func() { r.reg.snap = snapshot(t, 13, 5, "PUT") })
	if got := recv(t, "good snapshot", w.snaps); got.PolicyRevision != 5 {
		t.Errorf("policy %d", got.PolicyRevision)
	}
	report(t, r, "ack", func(p mesh.Proxy) bool { return p.State == "" && p.PolicyRevision == 5 })
}

func TestWhatIsHadIsNotSentAgain(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	w := newWatcher()
	h := billingHello()
	h.Have = r.reg.Current().Project(billing)
	subscribe(t, c, h, w)
	report(t, r, "ack", func(p mesh.Proxy) bool { return p.PolicyRevision == 3 })
	if len(w.snaps) != 0 {
		t.Error("the snapshot in force was put in force again")
	}
}

func TestAChangeOfEntriesAsksForASync(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	w := newWatcher()
	subscribe(t, c, billingHello(), w)
	recv(t, "first sync", w.syncs)
	r.reg.change(func() { r.reg.entries[1].X509TTL = time.Minute })
	recv(t, "sync after a change of entries", w.syncs)
	r.srv.SyncNow()
	recv(t, "sync on demand", w.syncs)
}

// A gate holds up the looks of a subscription.
type gate struct {
	*memory
	shut            atomic.Bool
	entered, opened chan struct{}
}

func (g *gate) HeldAgent(ctx context.Context, id spiffeid.ID) (mesh.Agent, error) {
	if g.shut.CompareAndSwap(true, false) {
		g.entered <- struct{}{}
		<-g.opened
	}
	return g.memory.HeldAgent(ctx, id)
}

// TestASyncIsNotLostBesideAChange: a subscription that finds both a change and
// a demand to sync after a look acts on both, whichever wakes it.
func TestASyncIsNotLostBesideAChange(t *testing.T) {
	g := &gate{entered: make(chan struct{}), opened: make(chan struct{})}
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		g.memory = c.Registry.(*memory)
		c.Registry = g
	})
	c, _ := r.joined("node-b")
	w := newWatcher()
	subscribe(t, c, billingHello(), w)
	recv(t, "first sync", w.syncs)
	for range 30 {
		g.shut.Store(true)
		r.reg.change(func() {})
		recv(t, "look", g.entered)
		r.srv.SyncNow()
		r.reg.change(func() {})
		g.opened <- struct{}{}
		recv(t, "sync on demand", w.syncs)
	}
}

// TestTheStreamSurvivesTheIssuer kills the issuer and starts it again.
func TestTheStreamSurvivesTheIssuer(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	w := newWatcher()
	states := make(chan error, 1024)
	h := billingHello()
	h.OnState = func(err error) { states <- err }
	subscribe(t, c, h, w)
	recv(t, "snapshot", w.snaps)
	if err := recv(t, "state", states); err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := recv(t, "loss", states); !errors.Is(err, ErrUnreachable) {
		t.Errorf("state %v, want ErrUnreachable", err)
	}
	// At least one attempt finds nobody. One before it may still have found the
	// issuer on its way out.
	for err := error(nil); err == nil || !strings.Contains(err.Error(), nextReach); {
		if err = recv(t, "failed attempt", states); err != nil && !errors.Is(err, ErrUnreachable) {
			t.Errorf("state %v, want ErrUnreachable", err)
		}
	}
	e := mesh.Endpoint{Service: "billing", Address: netip.MustParseAddrPort("127.0.0.1:15006"), Agent: agentID("node-b")}
	before := read(r.reg, func() int { return r.reg.announced[e] })
	r.reg.change(func() { r.reg.snap = snapshot(t, 20, 9, "PUT") })
	r.start()
	if got := recv(t, "snapshot after the restart", w.snaps); got.Revision != 20 {
		t.Errorf("revision %d, want 20", got.Revision)
	}
	report(t, r, "ack", func(p mesh.Proxy) bool { return p.PolicyRevision == 9 })
	if n := read(r.reg, func() int { return r.reg.announced[e] }); n != before+1 {
		t.Errorf("endpoint announced %d times, want %d: again after the restart", n, before+1)
	}
}

func TestTheStreamFollowsARenewedSVID(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, h := r.joined("node-b")
	w := newWatcher()
	ended, _ := subscribe(t, c, billingHello(), w)
	recv(t, "snapshot", w.snaps)
	key := newKey(t)
	svid, err := c.Renew(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	h.set(pair(svid, key))
	// The first use makes the old serial void, under the stream's feet.
	if _, err := c.SyncEntries(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.reg.change(func() { r.reg.snap = snapshot(t, 11, 4, "PUT") })
	if got := recv(t, "snapshot on the new connection", w.snaps); got.Revision != 11 {
		t.Errorf("revision %d", got.Revision)
	}
	select {
	case err := <-ended:
		t.Errorf("Subscribe ended: %v", err)
	default:
	}
}

func TestSubscribeEndsWhenTheAgentIsOut(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*memory, spiffeid.ID)
		want   error
	}{
		"banned":   {func(m *memory, id spiffeid.ID) { m.agents[id] = mesh.Agent{ID: id, Banned: true} }, ErrBanned},
		"removed":  {func(m *memory, id spiffeid.ID) { delete(m.agents, id) }, ErrMustReattest},
		"replaced": {func(m *memory, id spiffeid.ID) { m.agents[id] = mesh.Agent{ID: id, Serial: "1"} }, ErrMustReattest},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, newCA(t, td))
			c, _ := r.joined("node-b")
			w := newWatcher()
			ended, _ := subscribe(t, c, billingHello(), w)
			recv(t, "snapshot", w.snaps)
			r.reg.change(func() { tt.change(r.reg, agentID("node-b")) })
			if err := recv(t, "end", ended); !errors.Is(err, tt.want) {
				t.Errorf("Subscribe: %v, want %v", err, tt.want)
			}
		})
	}
}

func TestAStreamDoesNotOutliveTheAgentSVID(t *testing.T) {
	a := newCA(t, td)
	r := newRig(t, a)
	a.ttl = 6 * time.Second
	c, _ := r.joined("node-b")
	w := newWatcher()
	ended, _ := subscribe(t, c, billingHello(), w)
	recv(t, "snapshot", w.snaps)
	if err := recv(t, "end", ended); !errors.Is(err, ErrMustReattest) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("Subscribe: %v, want ErrMustReattest", err)
	}
}

func TestAHelloIsRefused(t *testing.T) {
	r := newRig(t, newCA(t, td))
	at := func(svc, addr string) []mesh.Endpoint {
		return []mesh.Endpoint{{Service: mesh.ServiceName(svc), Address: netip.MustParseAddrPort(addr)}}
	}
	for _, tt := range []struct {
		name string
		h    Hello
		want string
	}{
		{"another agent's workload", Hello{Kind: KindSidecar, Workload: payment}, "has no entry for"},
		{"a gateway without an entry", Hello{Kind: KindGateway, Workload: egress}, "has no entry for"},
		{"a sidecar's node that asks for a gateway's view", Hello{Kind: KindGateway, Workload: billing}, "self:true"},
		{"another trust domain", Hello{Kind: KindSidecar, Workload: spiffeid.RequireFromString("spiffe://other.example/x")}, "not a workload of"},
		{"an unknown kind", Hello{Kind: "teapot", Workload: billing}, "neither"},
		{"another workload's service", Hello{Kind: KindSidecar, Workload: billing, Endpoints: at("inventory", "127.0.0.1:1")}, "which is not"},
		{"an unspecified address", Hello{Kind: KindSidecar, Workload: billing, Endpoints: at("billing", "0.0.0.0:1")}, "concrete address"},
		{"port zero", Hello{Kind: KindSidecar, Workload: billing, Endpoints: at("billing", "127.0.0.1:0")}, "concrete address"},
		{"a multicast address", Hello{Kind: KindSidecar, Workload: billing, Endpoints: at("billing", "224.0.0.1:5")}, "concrete address"},
		{"too many endpoints", Hello{Kind: KindSidecar, Workload: billing, Endpoints: slices.Repeat(at("billing", "127.0.0.1:1"), maxEndpoints+1)}, "at most"},
	} {
		c, _ := r.joined("node-b")
		ctx, cancel := context.WithCancel(t.Context())
		tt.h.OnState = func(err error) {
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %v, want ErrRefused with %q", tt.name, err, tt.want)
			}
			cancel()
		}
		if err := c.Subscribe(ctx, tt.h, newWatcher()); err != nil {
			t.Errorf("%s: Subscribe: %v", tt.name, err)
		}
	}
}

func TestAnEndpointWaitsForItsService(t *testing.T) {
	r := newRig(t, newCA(t, td))
	r.reg.snap = nil
	c, _ := r.joined("node-b")
	w := newWatcher()
	subscribe(t, c, billingHello(), w)
	recv(t, "sync", w.syncs)
	r.reg.change(func() { r.reg.snap = snapshot(t, 1, 1, "GET") })
	recv(t, "snapshot", w.snaps)
	e := mesh.Endpoint{Service: "billing", Address: netip.MustParseAddrPort("127.0.0.1:15006"), Agent: agentID("node-b")}
	if n := read(r.reg, func() int { return r.reg.announced[e] }); n != 1 {
		t.Errorf("announced %d times, want once", n)
	}
}

func TestALeaseIsKeptWhileTheProxyLives(t *testing.T) {
	r := newRig(t, newCA(t, td))
	r.retune(func(s *Server) { s.lease = 30 * time.Millisecond })
	c, _ := r.joined("node-b")
	c.alive = 10 * time.Millisecond
	h := billingHello()
	expires := time.Unix(2e9, 0)
	h.SVIDExpires = func() time.Time {
		expires = expires.Add(time.Minute)
		return expires
	}
	subscribe(t, c, h, newWatcher())
	for range 4 {
		if lease := recv(t, "announcement", r.reg.announces); lease != r.srv.lease {
			t.Errorf("lease %s", lease)
		}
	}
	report(t, r, "sign of life", func(p mesh.Proxy) bool { return p.SVIDExpires.After(time.Unix(2e9, 0).Add(3 * time.Minute)) })
}

func TestAGatewayGetsTheWayOut(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-g")
	w := newWatcher()
	subscribe(t, c, Hello{Kind: KindGateway, Workload: egress}, w)
	got := recv(t, "snapshot", w.snaps)
	if len(got.Endpoints) != 0 || len(got.Destinations) != 1 || len(got.Rules) != 1 || got.Rules[0].Dir != mesh.Out {
		t.Errorf("gateway's snapshot: %+v", got)
	}
}

func TestWhoAnswersMustBeTheIssuer(t *testing.T) {
	good := newCA(t, td)
	other := spiffeid.RequireTrustDomainFromString("other.example")
	const dead = "127.0.0.1:1" // a port that the servers of other tests are never given
	day := 24 * time.Hour
	for _, tt := range []struct {
		name   string
		ca     *ca
		change func(*ClientConfig)
		want   error
		says   string
	}{
		{"clock a day ahead", good, func(c *ClientConfig) { c.Now = func() time.Time { return time.Now().Add(day - time.Hour) } }, ErrClock, "set the clock"},
		{"clock a day behind", good, func(c *ClientConfig) { c.Now = func() time.Time { return time.Now().Add(-day) } }, ErrClock, "set the clock"},
		{"another root", good, func(c *ClientConfig) { c.Bundle = newCA(t, td).X509Bundle }, ErrUntrusted, "bundle"},
		{"no roots", good, func(c *ClientConfig) { c.Bundle = func() []*x509.Certificate { return nil } }, ErrUntrusted, "bundle"},
		{"another trust domain", newCA(t, other), func(*ClientConfig) {}, ErrTrustDomain, "other.example"},
		{"an agent in the issuer's place", newCA(t, td, func(c *x509.Certificate) {
			id := agentID("node-a")
			c.URIs[0] = id.URL()
		}), func(*ClientConfig) {}, ErrUntrusted, "/spire/server"},
		{"nobody", good, func(c *ClientConfig) { c.Addresses = []string{dead} }, ErrUnreachable, "connection refused"},
	} {
		r := newRig(t, tt.ca)
		c := r.client(&holder{}, tt.change)
		_, err := c.Attest(t.Context(), "join_token", []byte("node-a"), newKey(t))
		if !errors.Is(err, tt.want) || !strings.Contains(fmt.Sprint(err), tt.says) {
			t.Errorf("%s: %v, want %v saying %q", tt.name, err, tt.want, tt.says)
		}
		if _, err := c.GetBundle(t.Context()); !errors.Is(err, tt.want) {
			t.Errorf("%s: GetBundle: %v, want %v", tt.name, err, tt.want)
		}
	}
}

func TestAnIssuerThatIsDownIsPassedOver(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c := r.client(&holder{}, func(c *ClientConfig) { c.Addresses = []string{"127.0.0.1:1", r.addr} })
	if _, err := c.Attest(t.Context(), "join_token", []byte("node-a"), newKey(t)); err != nil {
		t.Error(err)
	}
	// A call after a restart is served at once, not after a pause.
	h := &holder{}
	one := r.client(h)
	if _, err := one.GetBundle(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.stop()
	for range 3 {
		if _, err := one.GetBundle(t.Context()); !errors.Is(err, ErrUnreachable) {
			t.Errorf("while down: %v, want ErrUnreachable", err)
		}
	}
	r.start()
	if _, err := one.GetBundle(t.Context()); err != nil {
		t.Errorf("after the restart: %v", err)
	}
}

func TestAnExpiredAgentKnowsItself(t *testing.T) {
	a := newCA(t, td)
	r := newRig(t, a)
	h := &holder{cert: a.issue(t, agentID("node-a"), newKey(t), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })}
	if _, err := r.client(h).SyncEntries(t.Context()); !errors.Is(err, ErrMustReattest) || !strings.Contains(err.Error(), "token create") {
		t.Errorf("got %v, want ErrMustReattest with a next step", err)
	}
	h.set(newCA(t, td).issue(t, agentID("node-a"), newKey(t)))
	if _, err := r.client(h).SyncEntries(t.Context()); !errors.Is(err, ErrMustReattest) {
		t.Errorf("SVID of another root: %v, want ErrMustReattest", err)
	}
}

// lineSource is an AuditSource of numbered lines.
type lineSource struct {
	mu    sync.Mutex
	lines [][]byte
	more  chan struct{}
	acked chan uint64
}

func (s *lineSource) add(lines ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range lines {
		s.lines = append(s.lines, []byte(l))
	}
	close(s.more)
	s.more = make(chan struct{})
}

func (s *lineSource) Next(ctx context.Context, after uint64) ([][]byte, uint64, error) {
	for {
		s.mu.Lock()
		lines, more := s.lines[after:], s.more
		s.mu.Unlock()
		if len(lines) > 0 {
			return lines, after + uint64(len(lines)), nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

func (s *lineSource) Acked(seq uint64) error { s.acked <- seq; return nil }

func TestAuditArrivesInOrderOverARestart(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	src := &lineSource{more: make(chan struct{}), acked: make(chan uint64, 1024)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.UploadAudit(ctx, billing, 0, src) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("UploadAudit: %v", err)
		}
	}()
	upTo := func(n uint64) {
		t.Helper()
		for recv(t, "acknowledgement", src.acked) < n {
		}
	}
	src.add("one", "two")
	upTo(2)
	r.stop()
	src.add("three", strings.Repeat("x", maxAuditLine))
	r.start()
	upTo(4)
	// More than one message holds.
	var many []string
	for i := range maxAuditLines + 10 {
		many = append(many, fmt.Sprint(i))
	}
	src.add(many...)
	upTo(uint64(4 + len(many)))
	r.sink.mu.Lock()
	defer r.sink.mu.Unlock()
	if n := len(r.sink.lines); n != 4+len(many) || r.sink.lines[0] != billing.Path()+" one" || !strings.HasSuffix(r.sink.lines[n-1], many[len(many)-1]) {
		t.Errorf("%d lines at the issuer, want %d", n, 4+len(many))
	}
}

// badSource fails.
type badSource struct{}

func (badSource) Next(context.Context, uint64) ([][]byte, uint64, error) { return nil, 0, errBroken }
func (badSource) Acked(uint64) error                                     { return nil }

func TestABrokenAuditSourceEndsTheUpload(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	if err := c.UploadAudit(t.Context(), billing, 0, badSource{}); !errors.Is(err, errBroken) {
		t.Errorf("got %v, want the source's error", err)
	}
}

func TestParseBundle(t *testing.T) {
	a := newCA(t, td)
	block := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	root := block("CERTIFICATE", a.root.Raw)
	for _, tt := range []struct {
		name string
		text []byte
		want string
	}{
		{"one root", root, ""},
		{"two roots and blanks", slices.Concat(root, []byte("\n"), root, []byte("\n \n")), ""},
		{"nothing", nil, "no certificate"},
		{"a key", block("PRIVATE KEY", []byte("x")), "PRIVATE KEY"},
		{"noise after a root", slices.Concat(root, []byte("noise")), "no PEM block"},
		{"broken DER", block("CERTIFICATE", []byte("x")), "certificate 1"},
		{"a leaf", block("CERTIFICATE", a.server.Certificate[0]), "not a CA"},
	} {
		got, err := ParseBundle(tt.text)
		if tt.want == "" && (err != nil || len(got) == 0) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// A candidate comes with the snapshot it stands beside, and what becomes of it
// says nothing of that.
func TestACandidateIsToldApart(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	w := newWatcher()
	tried := make(chan *mesh.Snapshot, 64)
	w.try = func(rows *mesh.Snapshot) error {
		tried <- rows
		if rows != nil && rows.Rules[0].Verb == "TRACE" {
			return errors.New("row pay-bill: verb\nis odd")
		}
		return nil
	}
	put := func(rev, policy uint64, verb string) {
		r.reg.change(func() {
			s := *snapshot(t, rev, policy, "GET")
			if verb != "" {
				next := snapshot(t, rev, policy, verb)
				s.Candidate = &mesh.Snapshot{PolicyRevision: policy, TrustDomain: td, Rules: next.Rules}
			}
			r.reg.snap = &s
		})
	}
	subscribe(t, c, billingHello(), w)
	if got := recv(t, "no candidate", tried); got != nil {
		t.Fatalf("tried %+v before there was a candidate", got)
	}
	put(11, 4, "PATCH")
	if got := recv(t, "candidate", tried); got == nil || got.PolicyRevision != 4 || got.Rules[len(got.Rules)-1].Verb != "PATCH" {
		t.Fatalf("tried %+v", got)
	}
	report(t, r, "ack", func(p mesh.Proxy) bool { return p.PolicyRevision == 4 && p.CandidateRefused == "" })
	// The same rows under another number: the rows are not sent again.
	put(12, 5, "PATCH")
	if got := recv(t, "renumbered candidate", tried); got == nil || got.PolicyRevision != 5 {
		t.Fatalf("tried %+v", got)
	}
	r.reg.change(func() {
		s := *snapshot(t, 13, 6, "GET")
		s.Candidate = &mesh.Snapshot{PolicyRevision: 6, TrustDomain: td, Rules: []mesh.Rule{s.Rules[1]}}
		s.Candidate.Rules[0].Verb = "TRACE"
		r.reg.snap = &s
	})
	recv(t, "bad candidate", tried)
	p := report(t, r, "refused candidate", func(p mesh.Proxy) bool { return p.CandidateRefused != "" })
	if p.CandidateRefused != "row pay-bill: verb is odd" || p.State != "" || p.PolicyRevision != 6 {
		t.Errorf("reported %+v: the snapshot was accepted", p)
	}
	put(14, 7, "")
	if got := recv(t, "end of the candidate", tried); got != nil {
		t.Errorf("tried %+v", got)
	}
	report(t, r, "ack without a candidate", func(p mesh.Proxy) bool { return p.PolicyRevision == 7 && p.CandidateRefused == "" })
}

// A candidate that cannot be read does not keep the snapshot from being used.
func TestAGarbledCandidateHurtsNothing(t *testing.T) {
	snap := snapshot(t, 10, 3, "GET")
	var own projection
	if err := own.project(snap, projectionKey{kind: KindSidecar, workload: billing}); err != nil {
		t.Fatal(err)
	}
	for name, body := range map[string]string{"no JSON": "{", "a field nobody knows": `{"rows":1}`, "another revision": string((&mesh.Snapshot{PolicyRevision: 2, TrustDomain: td}).Encode())} {
		w := newWatcher()
		s := &subscriberState{hello: billingHello(), handler: w}
		own.msg.Candidate = []byte(body)
		s.take(t.Context(), &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Snapshot{Snapshot: own.msg}})
		if ack := s.answer().GetAck(); ack.GetPolicyRevision() != 3 || !strings.HasPrefix(ack.GetCandidateRefused(), "candidate") {
			t.Errorf("%s: answered %v", name, s.answer())
		}
	}
}
