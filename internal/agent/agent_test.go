package agent

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/policyset"
	"sallyport/internal/telemetry"
)

func TestJoinGivesIdentityAndPolicy(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	if id := p.serves(); id != billing {
		t.Errorf("serves %s, want %s", id, billing)
	}
	if id, err := p.nodeIdentity(); err != nil || id.ID != node {
		t.Errorf("the node is %s, %v", id.ID, err)
	}
	await(t, func() bool { return p.ready.Err() == nil && p.Generation() > 0 })
	await(t, func() bool {
		eps := is.registry.Current().EndpointsOf("billing")
		return len(eps) == 1 && eps[0].Address == p.cfg.Inbound && eps[0].Agent == node
	})
	if tok, err := p.MintJWT(t.Context(), p.Entries()[0].ID, []string{"x"}); err != nil || tok == "" {
		t.Errorf("JWT: %q, %v", tok, err)
	}
	for _, f := range []string{nodeFile, heldFile, snapshotFile, entriesFile} {
		await(t, func() bool { _, err := os.Stat(p.file(f)); return err == nil }) // what is served may be kept a moment later
		info, err := os.Stat(p.file(f))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, info, err)
		}
	}
	if _, err := os.Stat(p.file(keyFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key that waited is still there: %v", err)
	}
}

func TestJoinRefusals(t *testing.T) {
	is := newIssuer(t)
	for name, c := range map[string]struct {
		token string
		want  error
		text  string
	}{
		"unknown token": {"no such token", control.ErrTokenUnknown, "next"},
		"no token":      {"", nil, "sallyport token create"},
	} {
		p := is.newProxy(t.TempDir(), c.token)
		err := p.Join(t.Context())
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) && c.want == nil {
			t.Errorf("%s: %v", name, err)
		}
		p.client.Close()
	}
}

func TestTokenOfAFile(t *testing.T) {
	is := newIssuer(t)
	file := filepath.Join(t.TempDir(), "token")
	p := is.newProxy(t.TempDir(), "", func(c *Config) { c.Join.JoinTokenFile = file })
	if err := p.Join(t.Context()); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("without the file: %v", err)
	}
	if err := os.WriteFile(file, []byte(is.token("node-b")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.join()
}

// The answer to the attestation is lost, even by a crash: the same key gets it
// again with a token that is spent.
func TestLostReply(t *testing.T) {
	is := newIssuer(t)
	dir, token := t.TempDir(), is.token("node-b")
	p := is.newProxy(dir, token)
	key, err := p.nodeKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.client.Attest(t.Context(), "join_token", []byte(token), key); err != nil {
		t.Fatal(err)
	}
	p.client.Close() // it dies here
	is.newProxy(dir, token).join()
	thief := is.newProxy(t.TempDir(), token)
	defer thief.client.Close()
	if err := thief.Join(t.Context()); !errors.Is(err, control.ErrTokenUsed) {
		t.Errorf("another key with the same token: %v", err)
	}
}

func TestJoinWaitsForTheIssuer(t *testing.T) {
	is := newIssuer(t)
	is.stop()
	p := is.newProxy(t.TempDir(), is.token("node-b"))
	done := make(chan error, 1)
	go func() { done <- p.Join(t.Context()) }()
	await(t, func() bool { return strings.Contains(p.log.String(), "trying again") })
	is.start()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	p.run().serves()
}

func TestRestartWhileTheIssuerIsDown(t *testing.T) {
	is := newIssuer(t)
	dir := t.TempDir()
	p := is.newProxy(dir, is.token("node-b")).join()
	await(t, func() bool { _, err := os.Stat(p.file(snapshotFile)); return err == nil })
	p.stop()
	is.stop()
	again := is.newProxy(dir, "")
	if err := again.Join(t.Context()); err != nil {
		t.Fatal(err)
	}
	again.run()
	if id := again.serves(); id != billing || again.Snapshot() == nil || len(again.Entries()) != 1 {
		t.Errorf("serves %s with %v", id, again.Entries())
	}
}

func TestDamagedFilesAreFetchedAnew(t *testing.T) {
	is := newIssuer(t)
	dir := t.TempDir()
	token := is.token("node-b")
	p := is.newProxy(dir, token).join()
	await(t, func() bool { _, err := os.Stat(p.file(snapshotFile)); return err == nil })
	p.stop()
	for _, f := range []string{heldFile, snapshotFile, entriesFile} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	again := is.newProxy(dir, "").join()
	if id := again.serves(); id != billing || !strings.Contains(again.log.String(), "of no use") {
		t.Errorf("serves %s: %s", id, again.log)
	}
}

func TestFilesOfAnotherTrustDomain(t *testing.T) {
	is := newIssuer(t)
	dir := t.TempDir()
	is.newProxy(dir, is.token("node-b")).join().stop()
	cfg := is.newProxy(t.TempDir(), "").cfg
	cfg.DataDir, cfg.TrustDomain = dir, meshtest.NewCA(t, mustTD("other.example")).TrustDomain()
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "demo.sallyport") {
		t.Errorf("got %v", err)
	}
}

func TestSnapshotsGoForwardOnly(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	is.apply(entriesYAML, allowRow)
	await(t, func() bool { return p.Snapshot().PolicyRevision == 2 })
	now := p.Snapshot()
	old := *now
	old.PolicyRevision = 1
	last := *p.Snapshot()
	last.PolicyRevision = policyset.MaxRevision
	if err := p.OnSnapshot(t.Context(), &last); err == nil || !strings.Contains(err.Error(), "too far above") {
		t.Errorf("a revision after which there is none: %v", err)
	}
	if err := p.OnSnapshot(t.Context(), &old); err == nil || !strings.Contains(err.Error(), "newer") {
		t.Errorf("an older policy: %v", err)
	}
	foreign := *now
	foreign.PolicyRevision, foreign.TrustDomain = 3, mustTD("other.example")
	if err := p.OnSnapshot(t.Context(), &foreign); err == nil || !strings.Contains(err.Error(), "other.example") {
		t.Errorf("a policy of another trust domain: %v", err)
	}
	// Endpoints may have come meanwhile.
	if got := p.Snapshot(); got.PolicyRevision != now.PolicyRevision || got.TrustDomain != now.TrustDomain {
		t.Errorf("the policy in force was replaced by revision %d of %s", got.PolicyRevision, got.TrustDomain)
	}
}

const allowRow = "p, a, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /x, -, allow\n"

// A policy that cannot be used is told to the issuer, and the old one stays in
// force and on disk.
func TestPolicyThatCannotBeUsedIsRefused(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	await(t, func() bool { return len(is.registry.Current().EndpointsOf("billing")) == 1 })
	no := errors.New("row a: does not compile")
	p.refuse.Store(&no)
	is.apply(entriesYAML, allowRow)
	await(t, func() bool {
		for _, x := range is.registry.Proxies() {
			if x.State == mesh.Rejected && strings.Contains(x.Reason, "does not compile") {
				return true
			}
		}
		return false
	})
	if s := p.Snapshot(); s.PolicyRevision != 1 {
		t.Errorf("revision %d is in force", s.PolicyRevision)
	}
	b, err := os.ReadFile(p.file(snapshotFile))
	if err != nil {
		t.Fatal(err)
	}
	if s, err := mesh.DecodeSnapshot(b); err != nil || s.PolicyRevision != 1 {
		t.Errorf("on disk: %v, %v", s, err)
	}
}

func TestSeveralIdentitiesNeedAChoice(t *testing.T) {
	is := newIssuer(t)
	is.apply(entriesYAML+secondEntry, "")
	p := is.newProxy(t.TempDir(), is.token("node-b"))
	if err := p.Join(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.run()
	await(t, func() bool { return strings.Contains(p.log.String(), "none is chosen") })
	if _, err := p.Self(); err == nil || p.ready.Err() == nil {
		t.Error("an identity is served that nobody chose")
	}
	p.stop()
	chosen := is.newProxy(p.cfg.DataDir, "", func(c *Config) { c.Identity = second }).join()
	if id := chosen.serves(); id != second {
		t.Errorf("serves %s, want %s", id, second)
	}
}

// An entry that comes later does not take the identity away that is served.
func TestLaterEntryLeavesTheIdentity(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	is.apply(entriesYAML+secondEntry, "")
	await(t, func() bool { return len(p.Entries()) == 2 })
	await(t, func() bool { return len(p.Source().Current().Identities) == 2 })
	if id, err := p.Self(); err != nil || id.ID != billing {
		t.Errorf("serves %s, %v", id.ID, err)
	}
	// After a restart it is the same, although nobody has chosen.
	p.stop()
	again := is.newProxy(p.cfg.DataDir, "").join()
	if id := again.serves(); id != billing {
		t.Errorf("after a restart serves %s", id)
	}
}

// The listeners judge by the identity they were opened for. Another one must
// not take its place under them.
func TestServedIdentityIsNeverExchanged(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	is.apply("entries:\n"+secondEntry, "")
	await(t, func() bool { return strings.Contains(p.log.String(), "restart the proxy to serve another") })
	await(t, func() bool { _, err := p.Self(); return err != nil && p.ready.Err() != nil })
	is.apply(entriesYAML, "")
	await(t, func() bool { id, err := p.Self(); return err == nil && id.ID == billing })
}

// What an earlier run served under another configuration is not served now.
func TestIdentityOfTheConfigurationCounts(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	is.apply(entriesYAML+secondEntry, "")
	await(t, func() bool { return len(p.Source().Current().Identities) == 2 })
	p.stop()
	dir := p.cfg.DataDir
	await(t, func() bool { _, err := os.Stat(filepath.Join(dir, snapshotFile)); return err == nil })
	is.stop()
	other := is.newProxy(dir, "", func(c *Config) { c.Identity = second }).run()
	if id := other.serves(); id != second {
		t.Errorf("serves %s, want %s", id, second)
	}
	other.stop()
	none := is.newProxy(dir, "", func(c *Config) { c.Identity = meshtest.ID("/third") })
	defer none.client.Close()
	if id, err := none.Self(); err == nil {
		t.Errorf("serves %s, which the configuration does not say", id.ID)
	}
}

func TestEntryThatGoesTakesTheIdentityAway(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	is.apply("entries: []\n", "")
	await(t, func() bool { _, err := p.Self(); return err != nil && p.ready.Err() != nil })
}

func TestNodeIsRenewedAtHalfItsLife(t *testing.T) {
	is := newIssuer(t)
	is.ca.agentTTL.Store(int64(11 * time.Second)) // certificates begin 10 s before they are made
	p := is.newProxy(t.TempDir(), is.token("node-b"))
	if err := p.Join(t.Context()); err != nil {
		t.Fatal(err)
	}
	is.ca.agentTTL.Store(int64(time.Hour))
	first, _ := p.nodeIdentity()
	p.run().serves()
	await(t, func() bool {
		id, err := p.nodeIdentity()
		return err == nil && id.Expires().After(first.Expires())
	})
	if id, err := p.nodeIdentity(); err != nil || id.ID != node || id.Key == first.Key {
		t.Errorf("renewed to %s, %v", id.ID, err)
	}
}

// The issuer has forgotten the node: it proves itself anew by the token that
// the operator brings, and traffic goes on meanwhile.
func TestNodeAttestsAgainWhenItMust(t *testing.T) {
	is := newIssuer(t)
	file := filepath.Join(t.TempDir(), "token")
	write := func() {
		if err := os.WriteFile(file, []byte(is.token("node-b")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	p := is.newProxy(t.TempDir(), "", func(c *Config) { c.Join.JoinTokenFile = file }).join()
	p.attested.Store(0)
	before := is.ca.signedAgents.Load()
	write()
	p.noticed(fmt.Errorf("sync: %w", control.ErrMustReattest))
	await(t, func() bool { return is.ca.signedAgents.Load() > before })
	await(t, func() bool { return strings.Count(p.log.String(), "node attested") == 2 })
	if id := p.serves(); id != billing {
		t.Errorf("serves %s", id)
	}
	p.noticed(control.ErrMustReattest) // of a call that was on its way
	if len(p.must) != 0 {
		t.Error("a late answer makes the node attest again")
	}
}

// A call fails for want of the new identity between the issuer's answer and the
// note that there is one: it must not have the node attest once more, which a
// token that is used up would not do.
func TestACallThatFailsMeanwhileAsksForNothing(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b"))
	p.attested.Store(0)
	p.noticed(control.ErrMustReattest)
	if len(p.must) != 1 {
		t.Fatal("nobody is told")
	}
	p.proved()
	p.noticed(control.ErrMustReattest)
	if len(p.must) != 0 {
		t.Error("a call that had the old identity makes the node attest again")
	}
}

func TestEdgesThatCouldNotBeToldAreKept(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b"), func(c *Config) { c.reportEvery = 5 * time.Millisecond }).join()
	is.stop()
	p.edges.Add(second.String(), billing.String(), "http", telemetry.Allowed, true, time.Now(), 5)
	p.tellEdges(t.Context())
	is.start()
	await(t, func() bool { return len(is.edges()) == 1 })
	if e := is.edges()[0]; e.Allowed != 1 {
		t.Errorf("told %d calls, want 1", e.Allowed)
	}
	p.edges.Add(second.String(), billing.String(), "http", telemetry.Allowed, true, time.Now(), 5)
	p.stop()
	if e := is.edges()[0]; e.Allowed != 2 {
		t.Errorf("at the end %d calls were told, want 2", e.Allowed)
	}
}

func TestConfigNamesEveryMistake(t *testing.T) {
	_, err := Open(Config{})
	for _, want := range []string{"trust domain: missing", "kind: missing", "use: missing", "log: missing", "issuer.addresses: missing", "issuer.bundle: missing"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
}

func TestTrustOutlivesNoRoot(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	p.stop()
	if got := p.trusted(); len(got) != 1 || !got[0].Equal(is.ca.Root()) {
		t.Errorf("trusts %d roots", len(got))
	}
	operator := []*x509.Certificate{meshtest.NewCA(t, meshtest.TD).Root()}
	p.roots = operator
	if got := p.trusted(); got[0].Equal(operator[0]) {
		t.Error("the bootstrap file counts beside a bundle that is good")
	}
	ended := *is.ca.Root()
	ended.NotAfter = time.Now().Add(-time.Second)
	for _, src := range []interface{ Current() *svidState }{p.held, p.node} {
		src.Current().Bundle.SetX509Authorities([]*x509.Certificate{&ended})
	}
	if got := p.trusted(); !got[0].Equal(operator[0]) {
		t.Error("a bundle whose roots have ended is all that is trusted")
	}
}
