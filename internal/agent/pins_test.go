package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
	"sallyport/internal/store"
)

// reviewer makes the key of somebody who signs.
func reviewer(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

// twoOfThree are the signers 1, 2 and 3, two of whom must sign.
func twoOfThree() Policy {
	p := Policy{Signers: policyset.Signers{Threshold: 2}}
	for n := byte(1); n <= 3; n++ {
		p.Signers.Keys = append(p.Signers.Keys, policyset.KeyOf(reviewer(n).Public().(ed25519.PublicKey)))
	}
	return p
}

// setOf makes a set of the files of the rig.
func setOf(t testing.TB, revision uint64, previous, access string, by ...byte) *policyset.Signed {
	t.Helper()
	return setIn(t, "demo.sallyport", revision, previous, access, by...)
}

func setIn(t testing.TB, domain string, revision uint64, previous, access string, by ...byte) *policyset.Signed {
	t.Helper()
	of := func(s string) []byte { return []byte(strings.ReplaceAll(s, "demo.sallyport", domain)) }
	s, err := policyset.New(policyset.Set{
		TrustDomain: mustTD(domain), Revision: revision, Previous: previous, Created: time.Unix(1_800_000_000, 0).UTC(),
		Files: []policyset.File{{Name: "access.csv", Data: of(access)}, {Name: "entries.yaml", Data: of(entriesYAML)}, {Name: "services.yaml", Data: of(servicesYAML)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range by {
		s.Sign(reviewer(n))
	}
	return s
}

// sent is what an issuer makes of a set for billing.
func sent(t testing.TB, s *policyset.Signed, rev uint64, eps ...mesh.Endpoint) *mesh.Snapshot {
	t.Helper()
	p, err := s.Policies()
	if err != nil {
		t.Fatal(err)
	}
	whole, err := mesh.Compile(p, rev, s.Revision, eps)
	if err != nil {
		t.Fatal(err)
	}
	own := whole.Project(billing)
	own.PolicySet = s.Hash()
	return own
}

const (
	otherRow = "p, b, in, spiffe://demo.sallyport/ns/shop/sa/other, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /other, -, allow\n"
	selfRow  = "p, s, in, spiffe://demo.sallyport/ns/shop/sa/billing, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /self, -, allow\n"
)

// gives is a fetch that gives a file, and counts.
type gives struct {
	file []byte
	err  error
	n    int
}

func (g *gives) fetch() ([]byte, error) {
	g.n++
	return g.file, g.err
}

func openTestPins(t *testing.T, dir string) *pins {
	t.Helper()
	p, err := openPins(Config{TrustDomain: meshtest.TD, Kind: control.KindSidecar, DataDir: dir, Policy: twoOfThree()})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// enforce puts a set in force as the agent does.
func (p *pins) enforce(t *testing.T, s *policyset.Signed) {
	t.Helper()
	g := gives{file: s.Encode()}
	err := p.look(billing, s.Hash(), g.fetch)
	var v *vouched
	if err == nil {
		v, _, err = p.own(sent(t, s, 10+s.Revision))
	}
	if err == nil {
		_, err = p.keep(v)
	}
	if err == nil {
		err = p.took(v)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestASetThatIsNoGood: nothing of it is in force, and the reason says why.
func TestASetThatIsNoGood(t *testing.T) {
	first, second := setOf(t, 1, "", otherRow, 1, 2), setOf(t, 2, "", otherRow+selfRow, 1, 2)
	third := func(by ...byte) *policyset.Signed { return setOf(t, 3, second.Hash(), selfRow, by...) }
	good := third(1, 3)
	altered := third(1, 2)
	for _, tt := range []struct {
		name, hash string
		file       []byte
		want       string
	}{
		{"none", "", nil, "names no signed set"},
		{"nobody signed", third().Hash(), third().Encode(), "0 of the 3 pinned keys have signed, 2 must"},
		{"one of two", third(1).Hash(), third(1).Encode(), "1 of the 3 pinned keys have signed, 2 must"},
		{"one of two, and strangers", third(1).Hash(), third(1, 7, 8, 9).Encode(), "1 of the 3 pinned keys have signed, 2 must"},
		{"altered under its signatures", altered.Hash(), bytes.Replace(altered.Encode(), []byte("/self"), []byte("/else"), 1), "gives out set"},
		{"another one", good.Hash(), second.Encode(), "gives out set " + second.Hash()[:12]},
		{"an older one", first.Hash(), first.Encode(), "revision 1, which is lower than 2"},
		{"another one of the same revision", setOf(t, 2, "", otherRow, 1, 2).Hash(), setOf(t, 2, "", otherRow, 1, 2).Encode(), "revision 2, as another one that was in force here"},
		{"of another trust domain", setIn(t, "other.example", 3, "", otherRow, 1, 2).Hash(), setIn(t, "other.example", 3, "", otherRow, 1, 2).Encode(), "trust domain other.example"},
		{"one after which there is none", setOf(t, policyset.MaxRevision, "", otherRow, 1, 2).Hash(), setOf(t, policyset.MaxRevision, "", otherRow, 1, 2).Encode(), "too far above 2"},
		{"a bad row", setOf(t, 3, "", "p, bad\n", 1, 2).Hash(), setOf(t, 3, "", "p, bad\n", 1, 2).Encode(), "access.csv:1"},
		{"nothing", good.Hash(), nil, "policy set: line 1"},
		{"more behind it", good.Hash(), append(good.Encode(), 'x'), "policy set: line"},
	} {
		p := openTestPins(t, t.TempDir())
		p.enforce(t, first)
		p.enforce(t, second)
		g := gives{file: tt.file}
		err := p.look(billing, tt.hash, g.fetch)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if _, _, err := p.own(sent(t, second, 99)); err != nil {
			t.Errorf("%s: afterwards the set in force: %v", tt.name, err)
		}
		fake := sent(t, second, 99)
		fake.PolicySet = tt.hash
		if _, _, err := p.own(fake); err == nil {
			t.Errorf("%s: a snapshot of it is taken", tt.name)
		}
		// It is not fetched again for each change of an endpoint.
		n := g.n
		if again := p.look(billing, tt.hash, g.fetch); again == nil || again.Error() != err.Error() || g.n != n {
			t.Errorf("%s: once more: %v, %d fetches", tt.name, again, g.n-n)
		}
	}
}

func TestABadSetIsFetchedAgainLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, s := openTestPins(t, t.TempDir()), setOf(t, 1, "", otherRow, 1)
		g := gives{file: s.Encode()}
		if err := p.look(billing, s.Hash(), g.fetch); err == nil {
			t.Error("one signature is enough")
		}
		time.Sleep(badFor)
		s.Sign(reviewer(2))
		g.file = s.Encode()
		if err := p.look(billing, s.Hash(), g.fetch); err != nil || g.n != 2 {
			t.Errorf("with two signatures: %v after %d fetches", err, g.n)
		}
		// What could not be fetched says nothing about the set.
		g = gives{err: fmt.Errorf("%w: gone", control.ErrUnfetched)}
		for range 2 {
			if err := p.look(billing, setOf(t, 2, "", otherRow).Hash(), g.fetch); !errors.Is(err, control.ErrUnfetched) {
				t.Error(err)
			}
		}
		if g.n != 2 {
			t.Errorf("%d fetches", g.n)
		}
	})
}

// TestASnapshotThatTheSetDoesNotSay is one of an issuer that is not honest.
func TestASnapshotThatTheSetDoesNotSay(t *testing.T) {
	s := setOf(t, 4, "", otherRow+selfRow, 2, 3)
	p := openTestPins(t, t.TempDir())
	p.enforce(t, s)
	at := mesh.Endpoint{Service: "billing", Agent: node, Address: netip.MustParseAddrPort("10.0.0.2:15006")}
	_, own, err := p.own(sent(t, s, 50, at))
	if err != nil || len(own.Endpoints) != 1 || own.Revision != 50 || own.PolicySet != s.Hash() || own.PolicyHash == "" {
		t.Fatalf("an honest one: %+v, %v", own, err)
	}
	for _, tt := range []struct {
		name   string
		change func(*mesh.Snapshot)
		want   string
	}{
		{"a row more", func(s *mesh.Snapshot) {
			r := s.Rules[0]
			r.ID, r.Path = "zz", "/**"
			s.Rules = append(slices.Clone(s.Rules), r)
		}, `row "zz" is not in it`},
		{"a row less", func(s *mesh.Snapshot) { s.Rules = s.Rules[1:] }, `row "b" is missing`},
		{"a row that is wider", func(s *mesh.Snapshot) { s.Rules = slices.Clone(s.Rules); s.Rules[0].Path = "/**" }, `row "b" is another one in it`},
		{"rows in another order", func(s *mesh.Snapshot) { s.Rules = slices.Clone(s.Rules); slices.Reverse(s.Rules) }, "rows in another order"},
		{"another identity of a service", func(s *mesh.Snapshot) { s.Services = slices.Clone(s.Services); s.Services[0].ID = second }, "other services"},
		{"a group", func(s *mesh.Snapshot) { s.Memberships = []mesh.Membership{{Group: "group:x", Member: second.String()}} }, "other groups"},
		{"a way out", func(s *mesh.Snapshot) { s.Destinations = []mesh.Destination{{Host: "evil.example"}} }, "other destinations"},
		{"an API key", func(s *mesh.Snapshot) { s.Tokens = &mesh.Tokens{APIKeys: []mesh.APIKey{{Name: "k"}}} }, "other token issuers and API keys"},
		{"rows that are only observed", func(s *mesh.Snapshot) { s.Modes = []mesh.FileMode{{File: "access.csv", Mode: "observe"}} }, "other modes"},
		{"an endpoint of what it does not call", func(s *mesh.Snapshot) {
			s.Endpoints = append(s.Endpoints, mesh.Endpoint{Service: "other", Address: at.Address})
		}, "other endpoints"},
		{"another revision", func(s *mesh.Snapshot) { s.PolicyRevision = 5 }, "sends revision 5 from policy set " + s.Hash()[:12] + ", which has revision 4"},
		{"a set that nobody looked at", func(s *mesh.Snapshot) { s.PolicySet = "x" }, "nobody has looked at"},
		{"no set", func(s *mesh.Snapshot) { s.PolicySet = "" }, "nobody has looked at"},
	} {
		snap := sent(t, s, 51, at)
		tt.change(snap)
		if _, _, err := p.own(snap); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if _, err := p.candidate(own); err == nil || !strings.Contains(err.Error(), "has none") {
		t.Errorf("rows to try that the set does not have: %v", err)
	}
}

// TestPinsOnDisk: what was in force is known after a restart, also when its file
// is not readable.
func TestPinsOnDisk(t *testing.T) {
	dir := t.TempDir()
	p := openTestPins(t, dir)
	var all []*policyset.Signed
	for n := uint64(1); n <= 5; n++ {
		s := setOf(t, n, "", fmt.Sprintf("# %d\n", n)+otherRow, 1, 2)
		p.enforce(t, s)
		all = append(all, s)
	}
	last := all[4]
	files, err := os.ReadDir(filepath.Join(dir, setsDir))
	if err != nil || len(files) != keepSets {
		t.Fatalf("%d sets are kept, %v", len(files), err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f.Name(), info.Mode(), err)
		}
	}

	p = openTestPins(t, dir)
	g := gives{file: all[0].Encode()}
	if err := p.look(billing, all[0].Hash(), g.fetch); err == nil || !strings.Contains(err.Error(), "lower than 5") {
		t.Errorf("the first set after a restart: %v", err)
	}
	if err := p.look(billing, all[3].Hash(), g.fetch); err == nil || !strings.Contains(err.Error(), "lower than 5") {
		t.Errorf("a set that is kept, but not the last: %v", err)
	}
	g.n = 0
	if err := p.look(billing, last.Hash(), g.fetch); err != nil || g.n != 0 {
		t.Errorf("the set of before: %v, %d fetches", err, g.n)
	}
	if s, err := openTestPins(t, dir).resume(billing, sent(t, last, 77)); err != nil || s.Revision != 77 || s.PolicySet != last.Hash() || len(s.Rules) != 1 {
		t.Errorf("resumed is %+v, %v", s, err)
	}
	// What is on disk beside the sets is believed no more than the issuer.
	lie := sent(t, last, 78)
	lie.Rules = nil
	if s, err := openTestPins(t, dir).resume(billing, lie); err != nil || len(s.Rules) != 1 {
		t.Errorf("resumed from other rows is %+v, %v", s, err)
	}
	// A snapshot of before the last set does not bring back what that ended.
	if s, err := openTestPins(t, dir).resume(billing, sent(t, all[3], 79)); err != nil || s.PolicySet != last.Hash() || s.PolicyRevision != last.Revision {
		t.Errorf("resumed from a snapshot of an older set is %+v, %v", s, err)
	}
	above := sent(t, last, 80)
	above.PolicyRevision++
	if _, err := openTestPins(t, dir).resume(billing, above); err == nil || !strings.Contains(err.Error(), "no signed set of revision 6") {
		t.Errorf("resumed from a set that is not kept: %v", err)
	}

	path := filepath.Join(dir, setsDir, setName{last.Revision, last.Hash()}.file())
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	p = openTestPins(t, dir)
	if _, err := p.resume(billing, sent(t, last, 77)); err == nil {
		t.Error("a damaged set is resumed")
	}
	if err := p.look(billing, all[3].Hash(), g.fetch); err == nil || !strings.Contains(err.Error(), "lower than 5") {
		t.Errorf("an older set beside a damaged one: %v", err)
	}
	p.enforce(t, last)
	if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, last.Encode()) {
		t.Errorf("fetched anew it is not on disk: %v", err)
	}
}

func TestOtherPinsDenyAll(t *testing.T) {
	dir := t.TempDir()
	p, s := openTestPins(t, dir), setOf(t, 3, "", otherRow, 1, 2)
	p.enforce(t, s)
	p = openTestPins(t, dir)
	p.signers.Keys, p.signers.Threshold = p.signers.Keys[1:], 2
	if _, err := p.resume(billing, sent(t, s, 1)); err == nil || !strings.Contains(err.Error(), "1 of the 2 pinned keys have signed") {
		t.Errorf("a set of before under other pins: %v", err)
	}
	// Revisions do not start over.
	old := setOf(t, 2, "", otherRow, 2, 3)
	g := gives{file: old.Encode()}
	if err := p.look(billing, old.Hash(), g.fetch); err == nil || !strings.Contains(err.Error(), "lower than 3") {
		t.Errorf("a lower revision under other pins: %v", err)
	}
}

func TestRefusalsAreRecordedWithinBounds(t *testing.T) {
	var r refusals
	now, kept := time.Now(), 0
	for range 1000 {
		if _, ok := r.next(now); ok {
			kept++
		}
	}
	if kept != refusalBurst {
		t.Errorf("%d of 1000 at once are recorded", kept)
	}
	if passed, ok := r.next(now.Add(refusalEvery)); !ok || passed != 1000-refusalBurst {
		t.Errorf("then %v, and %d passed over", ok, passed)
	}
}

// journal is what a proxy records.
type journal struct {
	mu   sync.Mutex
	all  []audit.Record
	fail error
}

func (j *journal) record(r *audit.Record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.fail == nil {
		j.all = append(j.all, *r)
	}
	return j.fail
}

func (j *journal) last() audit.Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.all) == 0 {
		return audit.Record{}
	}
	return j.all[len(j.all)-1]
}

// signedIssuer is an issuer that takes sets which two of three have signed.
func signedIssuer(t *testing.T) *issuer {
	t.Helper()
	is := newIssuer(t)
	is.stop()
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "signed.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	is.registry, err = registry.New(registry.Config{Store: st, TrustDomain: meshtest.TD, Log: slog.New(slog.DiscardHandler), Verify: twoOfThree().Signers.Verify})
	if err == nil {
		err = is.registry.Load(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	is.setFile = is.registry.PolicySetFile
	is.start()
	return is
}

func (is *issuer) push(s *policyset.Signed) *policyset.Signed {
	is.t.Helper()
	if err := is.registry.PushPolicies(is.t.Context(), s); err != nil {
		is.t.Fatal(err)
	}
	return s
}

// pinning makes a proxy count signatures.
func pinning(j *journal) func(*Config) {
	return func(c *Config) { c.Policy, c.Record = twoOfThree(), j.record }
}

// TestAPinnedProxyLooksItself joins, follows pushes, refuses an issuer that makes
// something else of a set, and goes on after a restart without an issuer.
func TestAPinnedProxyLooksItself(t *testing.T) {
	is := signedIssuer(t)
	first := is.push(setOf(t, 1, "", otherRow, 1, 2))
	dir, j := t.TempDir(), new(journal)
	p := is.newProxy(dir, is.token("node-b"), pinning(j)).join()
	if s := p.Snapshot(); s.PolicySet != first.Hash() || s.PolicyRevision != 1 {
		t.Errorf("in force is %d of set %s", s.PolicyRevision, s.PolicySet)
	}
	if r := j.last(); r.Kind != audit.KindPolicy || r.Decision != audit.Allow || r.Revision != 1 || !strings.Contains(r.Detail, first.Hash()) {
		t.Errorf("recorded is %+v", r)
	}
	fleet := func(revision uint64, fits func(mesh.Proxy) bool) {
		t.Helper()
		await(t, func() bool {
			ps := is.registry.Proxies()
			return len(ps) == 1 && (ps[0].PolicyRevision == revision || revision == 0) && fits(ps[0])
		})
	}
	verified := func(p mesh.Proxy) bool { return p.State == mesh.Synced && p.Verified }
	fleet(1, verified)

	second := is.push(setOf(t, 2, first.Hash(), otherRow+selfRow, 2, 3))
	fleet(2, verified)
	// One whose rows for this proxy are the same is looked at all the same.
	third := is.push(setOf(t, 3, second.Hash(), "# nothing new\n"+otherRow+selfRow, 1, 3))
	fleet(3, verified)
	await(t, func() bool { return p.Snapshot().PolicySet == third.Hash() })

	// The issuer is taken over: it sends a row that nobody signed.
	is.stop()
	is.hostile = func(s *mesh.Snapshot) *mesh.Snapshot {
		lie := *s
		lie.Revision++
		row := lie.Rules[0]
		row.ID, row.Path = "zz", "/**"
		lie.Rules = append(slices.Clone(lie.Rules), row)
		return &lie
	}
	is.start()
	fleet(0, func(p mesh.Proxy) bool {
		return p.State == mesh.Rejected && strings.Contains(p.Reason, `row "zz" is not in it`)
	})
	if s := p.Snapshot(); len(s.Rules) != 2 || s.PolicyRevision != 3 {
		t.Errorf("in force is %+v", s)
	}
	if r := j.last(); r.Decision != audit.Deny || r.Revision != 3 || !strings.Contains(r.Detail, `row "zz"`) {
		t.Errorf("recorded is %+v", r)
	}
	p.stop()
	is.stop()

	again := is.newProxy(dir, "", pinning(j))
	if err := again.Join(t.Context()); err != nil {
		t.Fatal(err)
	}
	again.run().serves()
	if s := again.Snapshot(); s.PolicySet != third.Hash() || len(s.Rules) != 2 {
		t.Errorf("after a restart in force is %+v", s)
	}
}

// TestAFreshPinnedProxyDeniesAll: no listener opens before a set is good.
func TestAFreshPinnedProxyDeniesAll(t *testing.T) {
	is := newIssuer(t) // it pins nothing
	j := new(journal)
	p := is.newProxy(t.TempDir(), is.token("node-b"), pinning(j))
	if err := p.Join(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.run()
	await(t, func() bool { return strings.Contains(j.last().Detail, "names no signed set") })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.AwaitPolicy(ctx); !errors.Is(err, context.DeadlineExceeded) || p.Snapshot() != nil {
		t.Errorf("it serves: %v", err)
	}
	if err := p.ready.Err(); err == nil {
		t.Error("it is ready")
	}
}

// TestAPolicyThatIsNotRecordedIsNotTaken, nor is one that is not on disk.
func TestAPolicyThatIsNotRecordedIsNotTaken(t *testing.T) {
	is := signedIssuer(t)
	first := is.push(setOf(t, 1, "", otherRow, 1, 2))
	dir, j := t.TempDir(), new(journal)
	p := is.newProxy(dir, is.token("node-b"), pinning(j)).join()
	p.settle(is) // else set 2 may come once more
	refused := func(why string) {
		t.Helper()
		await(t, func() bool {
			ps := is.registry.Proxies()
			return len(ps) == 1 && ps[0].State == mesh.Rejected && strings.Contains(ps[0].Reason, why)
		})
		if s := p.Snapshot(); s.PolicySet != first.Hash() {
			t.Errorf("in force is set %s", s.PolicySet)
		}
	}
	j.mu.Lock()
	j.fail = errors.New("disk on fire")
	j.mu.Unlock()
	second := is.push(setOf(t, 2, first.Hash(), otherRow+selfRow, 1, 2))
	refused("not recorded, so it is not taken: disk on fire")
	j.mu.Lock()
	j.fail = nil
	j.mu.Unlock()

	sets := filepath.Join(dir, setsDir)
	if err := os.Rename(sets, sets+".away"); err != nil {
		t.Fatal(err)
	}
	third := is.push(setOf(t, 3, second.Hash(), selfRow, 1, 2))
	refused("not kept on disk, so it is not taken")
	if err := os.Rename(sets+".away", sets); err != nil {
		t.Fatal(err)
	}
	// What the judge refuses leaves nothing behind.
	no := errors.New("no such row")
	p.refuse.Store(&no)
	fourth := is.push(setOf(t, 4, third.Hash(), "# 4\n"+otherRow, 1, 2))
	refused("no such row")
	p.refuse.Store(nil)
	if all, err := p.pins.onDisk(); err != nil || len(all) != 1 || all[0].revision != 1 {
		t.Errorf("on disk are %v, %v", all, err)
	}
	is.push(setOf(t, 5, fourth.Hash(), selfRow+otherRow, 1, 2))
	await(t, func() bool { return p.Snapshot().PolicyRevision == 5 })
}

// TestAPinnedCanary tries a set that the fleet does not have, and goes on to what
// overtakes it. It does not go back to the fleet's lower revision.
func TestAPinnedCanary(t *testing.T) {
	is := signedIssuer(t)
	first := is.push(setOf(t, 1, "", otherRow, 1, 2))
	p := is.newProxy(t.TempDir(), is.token("node-b"), pinning(new(journal))).join()
	await(t, func() bool {
		ps := is.registry.Proxies()
		return len(ps) == 1 && ps[0].Connected && ps[0].Verified
	})
	tried := setOf(t, 2, first.Hash(), otherRow+selfRow, 1, 2)
	if err := is.registry.TryPolicies(t.Context(), registry.Trial{Set: tried, Group: []string{"agent=" + node.String()}, By: "boss"}); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return p.Snapshot().PolicySet == tried.Hash() && len(p.Snapshot().Rules) == 2 })
	next := setOf(t, 3, first.Hash(), selfRow, 2, 3)
	if err := is.registry.OvertakePolicies(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return p.Snapshot().PolicySet == next.Hash() })
}

// BenchmarkLook is what a push costs a proxy that pins keys, and a change of an
// endpoint, with 10,000 rows of which it needs 100.
func BenchmarkLook(b *testing.B) {
	var rows strings.Builder
	for i := range 10_000 {
		dst := "stock"
		if i%100 == 0 {
			dst = "billing"
		}
		fmt.Fprintf(&rows, "p, r-%d, in, spiffe://demo.sallyport/ns/shop/sa/caller-%d, spiffe://demo.sallyport/ns/shop/sa/%s, 8443, GET, /v1/%d/**, -, allow\n", i, i%500, dst, i)
	}
	s := setOf(b, 1, "", rows.String(), 1, 2)
	p, err := openPins(Config{TrustDomain: meshtest.TD, Kind: control.KindSidecar, DataDir: b.TempDir(), Policy: twoOfThree()})
	if err != nil {
		b.Fatal(err)
	}
	file := s.Encode()
	b.Run("push", func(b *testing.B) {
		b.SetBytes(int64(len(file)))
		for b.Loop() {
			if p.next, err = p.read(billing, s.Hash(), file); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("endpoint", func(b *testing.B) {
		snap := sent(b, s, 1)
		for b.Loop() {
			if _, _, err := p.own(snap); err != nil {
				b.Fatal(err)
			}
		}
	})
}
