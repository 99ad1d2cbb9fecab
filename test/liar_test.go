package test

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
	"sallyport/internal/store"
	"sallyport/policies"
)

// A liar is an issuer that speaks the protocol as ours does, holds the CA and
// says what it likes.
type liar struct {
	*registry.Registry
	*meshtest.CA
	t      *testing.T
	server *tls.Certificate

	mu sync.Mutex
	// told makes of the honest snapshot and set what is sent.
	told    func(*mesh.Snapshot) *mesh.Snapshot
	file    func(hash string) ([]byte, error)
	fetched int
	// lies counts the changes of told, changed is closed at each.
	lies    uint64
	changed chan struct{}
	answers map[spiffeid.ID]mesh.Proxy
}

func reviewer(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func reviewers() (s policyset.Signers) {
	for n := byte(1); n <= 3; n++ {
		s.Keys = append(s.Keys, policyset.KeyOf(reviewer(n).Public().(ed25519.PublicKey)))
	}
	s.Threshold = 2
	return s
}

// startLiar serves at the address of the world's issuer.
func (w *world) startLiar() *liar {
	t := w.t
	t.Helper()
	l := &liar{t: t, CA: meshtest.NewCA(t, meshtest.TD), changed: make(chan struct{}), answers: map[spiffeid.ID]mesh.Proxy{}}
	own := l.Issue(t, control.ServerID(meshtest.TD), time.Hour)
	l.server = &tls.Certificate{PrivateKey: own.Key}
	for _, c := range own.Chain {
		l.server.Certificate = append(l.server.Certificate, c.Raw)
	}
	w.put(w.path("issuer", "bundle.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: l.Root().Raw})))
	st, err := store.OpenSQLite(t.Context(), w.path("issuer", "liar.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	quiet := slog.New(slog.DiscardHandler)
	if l.Registry, err = registry.New(registry.Config{Store: st, TrustDomain: meshtest.TD, Log: quiet, Verify: reviewers().Verify}); err == nil {
		err = l.Load(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	srv, err := control.NewServer(control.ServerConfig{
		TrustDomain: meshtest.TD, Registry: l, Authority: l, Audit: l, SetFile: l.setFile, Log: quiet,
		Verifiers: map[string]control.NodeVerifier{"join_token": attest.NewJoinToken(meshtest.TD, l.Registry)},
	})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", w.issuer)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(ctx, ln); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	// What the honest part changes, such as endpoints, is told too.
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-l.Registry.Changed():
				l.tell(nil)
			}
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return l
}

// tell changes what is said, nil only that it is said anew.
func (l *liar) tell(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f != nil {
		f()
	}
	l.lies++
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *liar) Current() *mesh.Snapshot {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.Registry.Current()
	if s == nil {
		return nil
	}

	said := *s
	said.Revision += 1000 * l.lies
	if l.told != nil {
		return l.told(&said)
	}
	return &said
}

func (l *liar) SnapshotFor(_, _ spiffeid.ID, _ string) (*mesh.Snapshot, bool) {
	return l.Current(), false
}

func (l *liar) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

func (l *liar) ReportProxy(p mesh.Proxy) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers[p.Workload] = p
}

func (l *liar) setFile(hash string) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fetched++
	if l.file != nil {
		return l.file(hash)
	}
	return l.PolicySetFile(hash)
}

func (l *liar) SignX509(_ context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration, dns []string) ([]*x509.Certificate, error) {
	return l.Sign(id, key, cmp.Or(ttl, time.Hour), dns...)
}

func (l *liar) SignAgent(_ context.Context, id spiffeid.ID, key crypto.PublicKey) ([]*x509.Certificate, error) {
	return l.Sign(id, key, time.Hour)
}

func (l *liar) SignJWT(context.Context, spiffeid.ID, []string, time.Duration) (string, time.Time, time.Time, error) {
	return "", time.Time{}, time.Time{}, fmt.Errorf("no tokens here")
}

func (l *liar) X509Bundle() []*x509.Certificate                                   { return []*x509.Certificate{l.Root()} }
func (l *liar) JWTKeys() []control.JWTKey                                         { return nil }
func (l *liar) ServerCertificate() (*tls.Certificate, error)                      { return l.server, nil }
func (l *liar) Receive(context.Context, spiffeid.ID, spiffeid.ID, [][]byte) error { return nil }

// demoSet is the demo's policies as a set, with rows more.
func demoSet(t *testing.T, revision uint64, rows string, by ...byte) *policyset.Signed {
	t.Helper()
	files, err := policyset.Pack(policies.FS)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(files, func(f policyset.File) bool { return f.Name == "access.csv" })
	files[i].Data = append(slices.Clone(files[i].Data), rows...)
	s, err := policyset.New(policyset.Set{TrustDomain: meshtest.TD, Revision: revision, Created: time.Unix(1_800_000_000, 0).UTC(), Files: files})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range by {
		s.Sign(reviewer(n))
	}
	return s
}

// lie is what the liar says, and what a proxy answers.
type lie struct {
	name string
	told func(*mesh.Snapshot) *mesh.Snapshot
	file []byte
	want string
}

// from says what a set says, under its own name and another.
func from(t *testing.T, set *policyset.Signed, name string) func(*mesh.Snapshot) *mesh.Snapshot {
	t.Helper()
	p, err := set.Policies()
	if err != nil {
		t.Fatal(err)
	}
	return func(s *mesh.Snapshot) *mesh.Snapshot {
		said, err := mesh.Compile(p, s.Revision, set.Revision, s.Endpoints)
		if err != nil {
			panic(err)
		}
		said.PolicySet = name
		return said
	}
}

// TestALyingIssuer lets real sidecars that pin keys speak to an issuer that lies
// in each way: they keep the last good set, say why and record it, and one that
// has none opens no door.
func TestALyingIssuer(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	l := w.startLiar()
	good := demoSet(t, 5, "", 1, 2)
	if err := l.PushPolicies(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	app := &http.Server{Handler: http.HandlerFunc(echo)}
	bill := l.start(w, "billing")
	ln, err := net.Listen("tcp", bill.app)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = app.Serve(ln) }()
	t.Cleanup(func() { app.Close() })
	billing := spiffeid.RequireFromString(id("/ns/shop/sa/billing"))
	answer := func(what string, who spiffeid.ID, fits func(mesh.Proxy) bool) {
		t.Helper()
		w.await("see "+what, func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return fits(l.answers[who])
		})
	}
	acks := func(p mesh.Proxy) bool { return p.State == "" && p.PolicyRevision == 5 && p.Verified && p.Connected }
	answer("an ack of the good set", billing, acks)
	w.await("see billing ready", func() bool { return w.readiness("billing") == http.StatusOK })

	const evil = "p, evil, in, **, **, *, *, **, -, allow\n"
	unsigned, few, older := demoSet(t, 6, evil), demoSet(t, 6, evil+"# few\n", 3), demoSet(t, 4, evil, 1, 2)
	same, foreign := demoSet(t, 5, evil, 1, 3), demoSet(t, 6, evil+"# foreign\n", 7, 8, 9)
	next := demoSet(t, 6, "# the next\n", 2, 3)
	lies := []lie{
		{"a row that the set does not have", func(s *mesh.Snapshot) *mesh.Snapshot {
			row := s.Rules[0]
			row.ID, row.Dir, row.Src, row.Dst, row.Verb, row.Path, row.Effect = "evil", mesh.In, "**", "**", "*", "**", mesh.Allow
			s.Rules = append([]mesh.Rule{row}, s.Rules...)
			slices.SortFunc(s.Rules, func(a, b mesh.Rule) int { return strings.Compare(a.ID, b.ID) })
			return s
		}, nil, `row "evil" is not in it`},
		{"no set", func(s *mesh.Snapshot) *mesh.Snapshot { s.PolicySet = ""; return s }, nil, "names no signed set"},
		{"a set that nobody signed", from(t, unsigned, unsigned.Hash()), unsigned.Encode(), "0 of the 3 pinned keys have signed, 2 must"},
		{"a set that one of three signed", from(t, few, few.Hash()), few.Encode(), "1 of the 3 pinned keys have signed, 2 must"},
		{"a set that others signed", from(t, foreign, foreign.Hash()), foreign.Encode(), "0 of the 3 pinned keys have signed, 2 must"},
		{"an older set", from(t, older, older.Hash()), older.Encode(), "has revision 4, which is lower than 5"},
		{"another set of the revision in force", from(t, same, same.Hash()), same.Encode(), "has revision 5, as another one"},
		{"a good set under the name of another", from(t, unsigned, strings.Repeat("a", 64)), next.Encode(), "gives out set " + next.Hash()[:12]},
		{"other rows than the next set has", from(t, unsigned, next.Hash()), next.Encode(), `row "evil" is not in it`},
		{"nothing in the place of a set", from(t, unsigned, strings.Repeat("b", 64)), []byte{}, "policy set: line 1"},
		{"a set without an end", from(t, unsigned, strings.Repeat("c", 64)), bytes.Repeat([]byte("x"), policyset.MaxSize+1), "more than 8388608 bytes as a policy set"},
	}
	tell := func(said lie) {
		l.tell(func() {
			l.told, l.file = said.told, nil
			if said.file != nil {
				l.file = func(string) ([]byte, error) { return said.file, nil }
			}
		})
	}
	for _, said := range lies {
		t.Run(said.name, func(t *testing.T) {
			tell(said)
			answer("a nack: "+said.want, billing, func(p mesh.Proxy) bool {
				return p.State == mesh.Rejected && strings.Contains(p.Reason, said.want)
			})
			w.awaitAudit("billing", "a refusal: "+said.want, func(a auditLine) bool {
				return a.Kind == "policy" && a.Decision == "deny" && strings.Contains(a.Detail, said.want)
			})
			if s := kept(t, w.path("billing", "snapshot.json")); s.PolicyRevision != 5 || slices.ContainsFunc(s.Rules, func(r mesh.Rule) bool { return r.ID == "evil" }) {
				t.Errorf("in force is revision %d", s.PolicyRevision)
			}
			l.tell(func() { l.told, l.file = nil, nil })
			answer("an ack once it is honest again", billing, acks)
		})
	}
	t.Run("a set that it withholds is no nack", func(t *testing.T) {
		withheld, before := demoSet(t, 7, "# withheld\n", 1, 2), 0
		l.tell(func() {
			before, l.told = l.fetched, from(t, withheld, withheld.Hash())
			l.file = func(hash string) ([]byte, error) { return nil, fmt.Errorf("%s: %w", hash, mesh.ErrNotFound) }
		})
		w.await("see it asked for again", func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			if p := l.answers[billing]; p.State == mesh.Rejected {
				t.Fatalf("a nack: %s", p.Reason)
			}
			return l.fetched > before+2
		})
		l.tell(func() { l.told, l.file = nil, nil })
		answer("an ack once it is honest again", billing, acks)
	})
	t.Run("a fresh proxy opens no door", func(t *testing.T) {
		tell(lies[3])
		pay := l.start(w, "payment")
		answer("a nack", spiffeid.RequireFromString(id("/ns/shop/sa/payment")), func(p mesh.Proxy) bool {
			return p.State == mesh.Rejected && strings.Contains(p.Reason, lies[3].want)
		})
		if c, err := net.Dial("tcp", pay.in); err == nil {
			c.Close()
			t.Error("it listens")
		}
		if code := w.readiness("payment"); code == http.StatusOK {
			t.Error("it is ready")
		}
		w.awaitAudit("payment", "the refusal", func(a auditLine) bool { return a.Kind == "policy" && a.Decision == "deny" })
		if sets, err := os.ReadDir(w.path("payment", "sets")); err != nil || len(sets) != 0 {
			t.Errorf("it keeps %v, %v", sets, err)
		}
	})
}

// start runs a sidecar that pins the keys of the reviewers.
func (l *liar) start(w *world, name string) *node {
	l.t.Helper()
	token, _, err := l.CreateToken(l.t.Context(), name, time.Minute)
	if err != nil {
		l.t.Fatal(err)
	}
	n := &node{name: name, in: freePort(l.t), app: freePort(l.t), out: freePort(l.t), billing: freePort(l.t)}
	w.write(name, w.sidecarConfig(n, token))
	keys := reviewers().Keys
	w.pin(name, []string{string(keys[0]), string(keys[1]), string(keys[2])})
	w.start(name, nil, "sidecar", "run", "--config", w.path(name, "config.yaml"))
	return n
}

// kept reads the snapshot that a proxy goes on with after a restart.
func kept(t *testing.T, file string) *mesh.Snapshot {
	t.Helper()
	s := new(mesh.Snapshot)
	if err := json.Unmarshal(readFile(t, filepath.Clean(file)), s); err != nil {
		t.Fatal(err)
	}
	return s
}
