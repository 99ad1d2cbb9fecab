package test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/agent"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/store/postgrestest"
	"sallyport/internal/svid"
	"sallyport/internal/telemetry"
	"sallyport/policies"
)

const (
	// troupeLife is how long the SVIDs live. An issuer that starts knows for
	// certain who lives after that time.
	troupeLife = 30 * time.Second
	// troupeSize proxies and the two sidecars renew together, so many times
	// that it is a thousand in all.
	troupeSize  = 24
	troupeRound = 1000/(troupeSize+2) + 1
	// leastMade requests are made meanwhile, however slow the machine is.
	leastMade = 1000
)

// A troupe is a number of proxies in the process of the test: each is the tie
// of a sidecar to its issuers, and a server that echoes one byte.
type troupe struct {
	t       *testing.T
	players []*player
	log     *lockedBuffer

	made, failed atomic.Int64
}

type player struct {
	*agent.Agent
	id spiffeid.ID
	at string // its server's address
}

// castEntries writes the entries of the demo and of the troupe into the policy
// folder. A proxy renews an SVID when its entry has another hint.
func (w *world) castEntries(round int) {
	w.t.Helper()
	base, err := policies.FS.ReadFile("entries.yaml")
	if err != nil {
		w.t.Fatal(err)
	}
	var b strings.Builder
	b.Write(base)
	for i := range troupeSize {
		fmt.Fprintf(&b, "  - spiffe_id: %s\n    parent_id: %s\n    selectors: [\"child:true\"]\n", playerID(i), id(fmt.Sprintf("/spire/agent/join_token/player-%d", i)))
	}
	hinted := strings.ReplaceAll(b.String(), "selectors: [", fmt.Sprintf("hint: round-%d\n    selectors: [", round))
	// As an editor saves: whole, or not at all.
	file := filepath.Join(w.policy, "entries.yaml")
	if err := daemon.WriteFile(file, []byte(hinted), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func playerID(i int) string { return id(fmt.Sprintf("/ns/troupe/sa/player-%d", i)) }

// hire joins the troupe to both issuers. Half know one first, half the other.
func hire(t *testing.T, first, second *world) *troupe {
	t.Helper()
	tr := &troupe{t: t, log: new(lockedBuffer)}
	log := slog.New(slog.NewTextHandler(tr.log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		running.Wait()
		if t.Failed() {
			t.Logf("the troupe printed:\n%s", tr.log)
		}
	})
	for i := range troupeSize {
		addresses := []string{first.issuer, second.issuer}
		if i%2 == 1 {
			addresses = []string{second.issuer, first.issuer}
		}
		name := fmt.Sprintf("player-%d", i)
		dir := first.path(name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		first.put(filepath.Join(dir, "audit.jsonl"), "")
		p := &player{id: spiffeid.RequireFromString(playerID(i))}
		var err error
		p.Agent, err = agent.Open(agent.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString(trustDomain), Kind: control.KindSidecar, DataDir: dir,
			Join: agent.Join{Addresses: addresses, Bundle: first.path("issuer", "bundle.pem"), JoinToken: first.token(name)},
			Use:  func(*mesh.Snapshot) error { return nil }, Rejudge: func() {},
			Audit: filepath.Join(dir, "audit.jsonl"), Edges: telemetry.NewEdges(), Metrics: telemetry.NewRegistry(), Ready: new(daemon.Ready), Log: log,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Join(ctx); err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			if err := p.Run(ctx); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p.at = ln.Addr().String()
		context.AfterFunc(ctx, func() { ln.Close() })
		running.Go(func() { p.serve(ln) })
		tr.players = append(tr.players, p)
	}
	return tr
}

// serve echoes one byte on each connection, by mutual TLS.
func (p *player) serve(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(within))
			s := tls.Server(conn, svid.ServerTLS(p.Source(), func(spiffeid.ID) error { return nil }))
			_, _ = io.CopyN(s, s, 1) // a failure is the caller's to tell
		}()
	}
}

// call makes a connection, with a handshake of its own, and one request.
func (p *player) call(to *player) error {
	conn, err := net.DialTimeout("tcp", to.at, within)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(within))
	c := tls.Client(conn, svid.ClientTLS(p.Source(), to.id))
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

// play lets everybody call everybody in turn until stop.
func (tr *troupe) play(stop <-chan struct{}) {
	pace := time.NewTicker(10 * time.Millisecond)
	defer pace.Stop()
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		case <-pace.C:
		}
		from := n % len(tr.players)
		to := (from + 1 + n/len(tr.players)%(len(tr.players)-1)) % len(tr.players)
		tr.made.Add(1)
		if err := tr.players[from].call(tr.players[to]); err != nil {
			tr.failed.Add(1)
			tr.t.Errorf("player %d calls player %d: %v", from, to, err)
		}
	}
}

// renewed says that everybody has the SVID of a round.
func (tr *troupe) renewed(round int) func() bool {
	return func() bool {
		for _, p := range tr.players {
			st := p.Source().Current()
			if st == nil || len(st.Identities) != 1 || st.Identities[0].Hint != fmt.Sprintf("round-%d", round) {
				return false
			}
		}
		return true
	}
}

// under says that everybody trusts one root alone, and shows an SVID under it.
func (tr *troupe) under(root string) func() bool {
	return func() bool {
		for _, p := range tr.players {
			st := p.Source().Current()
			trusted := st.Bundle.X509Authorities()
			if len(trusted) != 1 || mesh.RootID(trusted[0].Raw) != root || st.Identities[0].Root(st.Bundle) == nil {
				return false
			}
		}
		return true
	}
}

// issued counts the SVIDs of workloads in the audit log of an issuer.
func (w *world) issued() (n int) {
	for _, r := range w.audit("issuer") {
		if r.Kind == "issue" && r.Reason == "done" && strings.HasPrefix(r.Dst, id("/ns/")) {
			n++
		}
	}
	return n
}

// An act is a step of the rotation of the root, taken once the one before has
// had its effect.
type act struct {
	name  string
	ready func() bool
	do    func()
}

// TestRotationOfSeveralIssuers replaces the root of two issuers on one
// database, kills the one that began it, and lets a thousand SVIDs be renewed
// meanwhile: no call may fail.
func TestRotationOfSeveralIssuers(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	at := postgrestest.Start(t).Database(t)
	first := newWorld(t, troupeLife)
	first.castEntries(0)
	first.shares(at, troupeLife, ", jwt_ttl: 2s")
	leader := first.startIssuer()
	second := first.beside("second")
	second.castEntries(0)
	second.shares(at, troupeLife, ", jwt_ttl: 2s, root_dir: "+first.copyRoot())
	second.startIssuer()
	tr := hire(t, first, second)
	caller := first.twoIssuersPair(second)
	first.awaitReach(caller, "http://billing.mesh.internal/v1/charges")
	first.await("have an SVID everywhere", tr.renewed(0))

	stop := make(chan struct{})
	var load sync.WaitGroup
	halt := sync.OnceFunc(func() { close(stop); load.Wait() })
	defer halt() // also when the test fails
	load.Go(func() { tr.play(stop) })
	load.Go(func() { tr.curl(caller, stop) })

	before := second.roots()
	acts := rotationActs(t, first, second, leader)
	round := 0
	for deadline := time.Now().Add(8 * time.Minute); round < troupeRound || len(acts) > 0 || tr.made.Load() < leastMade; {
		if time.Now().After(deadline) {
			t.Fatalf("after %d rounds and %d requests %d acts are left: %+v", round, tr.made.Load(), len(acts), second.roots())
		}
		round++
		second.castEntries(round)
		second.await(fmt.Sprintf("renew every SVID for the %dth time", round), tr.renewed(round))
		if len(acts) > 0 && acts[0].ready() {
			t.Logf("round %d: %s", round, acts[0].name)
			acts[0].do()
			acts = acts[1:]
		}
	}
	now := second.roots()
	if got := first.roots(); now.Phase != "steady" || now.Authorities[0].ID == before.Authorities[0].ID || got.Authorities[0].ID != now.Authorities[0].ID {
		t.Errorf("one issuer has %+v, the other %+v, and before it was %+v", got, now, before)
	}
	first.await("have everybody under the new root alone", tr.under(now.Authorities[0].ID))
	halt()
	issued := first.issued() + second.issued()
	t.Logf("root replaced by two issuers, the leader killed: %d SVIDs issued in %d rounds, %d requests made, %d failed", issued, round, tr.made.Load(), tr.failed.Load())
	if issued < 1000+troupeSize+2 || tr.made.Load() < leastMade {
		t.Error("that is too few to show anything")
	}
}

// rotationActs is a full rotation in which the issuer that began it is killed
// at once, and comes back later.
func rotationActs(t *testing.T, first, second *world, leader *proc) []act {
	confirmed := func(issuers int) func() bool {
		return func() bool {
			st := second.roots()
			return st.Known && st.IssuersLive == issuers && st.IssuersConfirmed == issuers && st.Live == troupeSize+2 && st.Confirmed == st.Live
		}
	}
	return []act{
		{"the first issuer prepares, and is killed", func() bool { st := second.roots(); return st.IssuersLive == 2 && st.IssuersConfirmed == 2 }, func() {
			first.moves(t, "prepared", "ca", "rotate")
			leader.kill()
		}},
		{"the second activates, for the dead does not count any more", confirmed(1), func() {
			second.moves(t, "activated", "ca", "rotate")
		}},
		{"the first comes back", func() bool { return second.roots().Phase == "activated" }, func() {
			first.startIssuer()
			if st := first.roots(); st.Phase != "activated" || st.Authorities[0].ID != second.roots().Authorities[0].ID {
				t.Errorf("the issuer that came back stands at %+v", st)
			}
		}},
		{"the second goes on by itself", confirmed(2), func() {
			second.moves(t, "tainted steady", "ca", "rotate", "--through")
		}},
		{"the old root is gone", func() bool { return second.roots().Phase == "steady" && first.roots().Phase == "steady" }, func() {}},
	}
}

// curl calls through two sidecars until stop.
func (tr *troupe) curl(caller *hand, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		tr.made.Add(1)
		r, err := try[runReply](caller, "/run", curl("http://billing.mesh.internal/v1/charges/7"))
		if err != nil || !strings.Contains(r.Output, " 200 ") {
			tr.failed.Add(1)
			tr.t.Errorf("a call failed: %v %s", err, r.Output)
		}
	}
}
