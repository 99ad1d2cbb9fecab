package svid

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func anybody(spiffeid.ID) error { return nil }

// shake makes one handshake and one echo, and gives both ends' verdicts.
func shake(t testing.TB, server, client *tls.Config) (cs, ss tls.ConnectionState, cerr, serr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			serr = err
			return
		}
		s := tls.Server(c, server)
		defer s.Close()
		if serr = s.Handshake(); serr != nil {
			return
		}
		ss = s.ConnectionState()
		_, serr = io.CopyN(s, s, 4)
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	k := tls.Client(c, client)
	defer k.Close()
	if cerr = k.Handshake(); cerr == nil {
		cs = k.ConnectionState()
		if _, cerr = k.Write([]byte("ping")); cerr == nil {
			_, cerr = io.ReadFull(k, make([]byte, 4)) // a refusal of our certificate arrives here
		}
	}
	k.Close()
	<-done
	return
}

func TestHandshake(t *testing.T) {
	ca := newCA(t, td)
	billing, payment := ca.source(id("/billing")), ca.source(id("/payment"))
	cs, ss, cerr, serr := shake(t, ServerTLS(billing, anybody, "h2", "http/1.1"), ClientTLS(payment, id("/billing"), "http/1.1"))
	if cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	if got, err := PeerID(cs); err != nil || got != id("/billing") {
		t.Errorf("client sees %v, %v", got, err)
	}
	if got, err := PeerID(ss); err != nil || got != id("/payment") {
		t.Errorf("server sees %v, %v", got, err)
	}
	if cs.Version != tls.VersionTLS13 || cs.CurveID != tls.X25519MLKEM768 || cs.NegotiatedProtocol != "http/1.1" {
		t.Errorf("version %x, curve %v, protocol %q", cs.Version, cs.CurveID, cs.NegotiatedProtocol)
	}
	if _, err := PeerID(tls.ConnectionState{}); err == nil {
		t.Error("the zero connection has a peer")
	}
}

func TestHandshakeRefuses(t *testing.T) {
	ca, evil := newCA(t, td), newCA(t, td)
	net := newCA(t, spiffeid.RequireTrustDomainFromString("example.net"))
	billing, payment := ca.source(id("/billing")), ca.source(id("/payment"))
	ok := func() (*tls.Config, *tls.Config) {
		return ServerTLS(billing, anybody), ClientTLS(payment, id("/billing"))
	}
	lax := func(c *tls.Config) *tls.Config { c.VerifyConnection = nil; return c }
	for _, c := range []struct {
		name string
		make func() (server, client *tls.Config)
	}{
		{"server that is another workload", func() (*tls.Config, *tls.Config) {
			return ServerTLS(billing, anybody), ClientTLS(payment, id("/inventory"))
		}},
		{"client that wants nobody", func() (*tls.Config, *tls.Config) {
			return ServerTLS(billing, anybody), ClientTLS(payment, spiffeid.ID{})
		}},
		{"caller not authorized", func() (*tls.Config, *tls.Config) {
			return ServerTLS(billing, func(spiffeid.ID) error { return errors.New("no") }), ClientTLS(payment, id("/billing"))
		}},
		{"no authorize function", func() (*tls.Config, *tls.Config) { return ServerTLS(billing, nil), ClientTLS(payment, id("/billing")) }},
		{"caller without certificate", func() (*tls.Config, *tls.Config) {
			s, k := ok()
			k.GetClientCertificate = nil
			return s, k
		}},
		{"caller of another CA", func() (*tls.Config, *tls.Config) {
			return ServerTLS(billing, anybody), lax(ClientTLS(evil.source(id("/payment")), id("/billing")))
		}},
		{"server of another CA", func() (*tls.Config, *tls.Config) {
			return lax(ServerTLS(evil.source(id("/billing")), anybody)), ClientTLS(payment, id("/billing"))
		}},
		{"caller of an unknown trust domain", func() (*tls.Config, *tls.Config) {
			return ServerTLS(billing, anybody), lax(ClientTLS(net.source(spiffeid.RequireFromString("spiffe://example.net/payment")), id("/billing")))
		}},
		{"TLS 1.2", func() (*tls.Config, *tls.Config) {
			s, k := ok()
			k.MinVersion, k.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			return s, k
		}},
		{"server without identity", func() (*tls.Config, *tls.Config) {
			return ServerTLS(NewSource(), anybody), ClientTLS(payment, id("/billing"))
		}},
		{"client without identity", func() (*tls.Config, *tls.Config) {
			return ServerTLS(billing, anybody), ClientTLS(NewSource(), id("/billing"))
		}},
		{"own certificate expired", func() (*tls.Config, *tls.Config) {
			s := ca.source(id("/payment"))
			s.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
			return ServerTLS(billing, anybody), ClientTLS(s, id("/billing"))
		}},
		{"peer certificate expired", func() (*tls.Config, *tls.Config) {
			s := ca.source()
			s.Set(&State{Bundle: ca.bundle(), Identities: []Identity{ca.identity(id("/billing"), 3*time.Hour)}})
			s.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
			return ServerTLS(s, anybody), ClientTLS(payment, id("/billing"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			server, client := c.make()
			_, _, cerr, serr := shake(t, server, client)
			if cerr == nil {
				t.Errorf("client succeeded; server: %v", serr)
			}
		})
	}
}

func TestFederatedPeerIsVerifiedByItsOwnBundle(t *testing.T) {
	ca, far := newCA(t, td), newCA(t, spiffeid.RequireTrustDomainFromString("example.net"))
	farID := spiffeid.RequireFromString("spiffe://example.net/x")
	with := func(a, b *testCA, who spiffeid.ID) *Source {
		s := NewSource()
		if err := s.Set(&State{Bundle: a.bundle(), Identities: []Identity{a.identity(who, time.Hour)},
			Federated: map[spiffeid.TrustDomain]*x509bundle.Bundle{b.td: b.bundle()}}); err != nil {
			t.Fatal(err)
		}
		return s
	}
	near, away := with(ca, far, id("/billing")), with(far, ca, farID)
	if _, _, cerr, serr := shake(t, ServerTLS(near, anybody), ClientTLS(away, id("/billing"))); cerr != nil || serr != nil {
		t.Errorf("federated peer refused: %v, %v", cerr, serr)
	}
	// The foreign CA cannot speak for our trust domain: bundles are not merged.
	forged := far.issue(far.leaf("spiffe://example.org/payment", time.Hour), newKey(t).Public())
	if got, err := near.Current().verifyPeer(forged, time.Now()); err == nil {
		t.Errorf("foreign CA vouched for %v", got)
	}
}

func TestResumptionDoesNotPassTheCheck(t *testing.T) {
	ca := newCA(t, td)
	for _, tickets := range []bool{false, true} {
		var calls atomic.Int64
		var deny atomic.Bool
		server := ServerTLS(ca.source(id("/billing")), func(spiffeid.ID) error {
			calls.Add(1)
			if deny.Load() {
				return errors.New("denied by policy")
			}
			return nil
		})
		client := ClientTLS(ca.source(id("/payment")), id("/billing"))
		client.ServerName = "billing" // a cache key: the client tries to resume
		client.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		client.SessionTicketsDisabled = false
		server.SessionTicketsDisabled = !tickets
		if _, _, cerr, serr := shake(t, server, client); cerr != nil || serr != nil {
			t.Fatal(cerr, serr)
		}
		cs, _, cerr, serr := shake(t, server, client)
		if cerr != nil || serr != nil || cs.DidResume != tickets {
			t.Fatalf("tickets %v: resumed %v, %v, %v", tickets, cs.DidResume, cerr, serr)
		}
		if calls.Load() != 2 {
			t.Errorf("tickets %v: authorize ran %d times in 2 handshakes", tickets, calls.Load())
		}
		deny.Store(true)
		if _, _, cerr, _ := shake(t, server, client); cerr == nil {
			t.Errorf("tickets %v: a peer denied since was accepted", tickets)
		}
	}
	if !ServerTLS(ca.source(), anybody).SessionTicketsDisabled {
		t.Error("tickets are on")
	}
}

func TestHandshakeFollowsRotation(t *testing.T) {
	ca := newCA(t, td)
	s := ca.source(id("/billing"))
	server, client := ServerTLS(s, anybody), ClientTLS(ca.source(id("/payment")), id("/billing"))
	before, _, err, _ := shake(t, server, client)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Set(&State{Bundle: ca.bundle(), Identities: []Identity{ca.identity(id("/billing"), time.Hour)}}); err != nil {
		t.Fatal(err)
	}
	after, _, err, _ := shake(t, server, client)
	if err != nil || before.PeerCertificates[0].Equal(after.PeerCertificates[0]) {
		t.Errorf("the second handshake did not show the new SVID (%v)", err)
	}
}

func TestSourceSetKeepsTheOldStateOnError(t *testing.T) {
	ca, other := newCA(t, td), newCA(t, td)
	s := ca.source(id("/a"))
	old := s.Current()
	good := ca.identity(id("/b"), time.Hour)
	bad := func(change func(*Identity)) *State {
		i := good
		change(&i)
		return &State{Bundle: ca.bundle(), Identities: []Identity{i}}
	}
	for name, st := range map[string]*State{
		"nil":               nil,
		"no bundle":         {Identities: []Identity{good}},
		"empty bundle":      {Bundle: x509bundle.New(td), Identities: []Identity{good}},
		"another CA":        {Bundle: other.bundle(), Identities: []Identity{good}},
		"another key":       bad(func(i *Identity) { i.Key = newKey(t) }),
		"no key":            bad(func(i *Identity) { i.Key = nil }),
		"another ID":        bad(func(i *Identity) { i.ID = id("/c") }),
		"no chain":          bad(func(i *Identity) { i.Chain = nil }),
		"expired":           {Bundle: ca.bundle(), Identities: []Identity{ca.identity(id("/b"), -time.Second)}},
		"federated is ours": {Bundle: ca.bundle(), Federated: map[spiffeid.TrustDomain]*x509bundle.Bundle{td: ca.bundle()}},
	} {
		if err := s.Set(st); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if s.Current() != old {
			t.Fatalf("%s: the state changed", name)
		}
	}
}

func TestSourceWakesWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t, td) // certificates of the bubble's time
		s := NewSource()
		if s.Current() != nil {
			t.Error("state before the first Set")
		}
		done := make(chan error)
		go func() { done <- s.WaitReady(t.Context()) }()
		changed := s.Changed()
		if err := s.Set(&State{Bundle: ca.bundle()}); err != nil {
			t.Fatal(err)
		}
		<-changed
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("ready without an identity (%v)", err)
		default:
		}
		if err := s.Set(&State{Bundle: ca.bundle(), Identities: []Identity{ca.identity(id("/a"), time.Hour)}}); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := NewSource().WaitReady(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("WaitReady after cancel: %v", err)
	}
}

func TestSaveAndLoad(t *testing.T) {
	ca, far := newCA(t, td), newCA(t, spiffeid.RequireTrustDomainFromString("example.net"))
	a, b := ca.identity(id("/a"), time.Hour), ca.identity(id("/b"), 2*time.Hour)
	a.Hint = "internal"
	st := &State{Bundle: ca.bundle(), Identities: []Identity{a, b}, JWTKeys: map[string]crypto.PublicKey{"k1": newKey(t).Public()},
		Federated: map[spiffeid.TrustDomain]*x509bundle.Bundle{far.td: far.bundle()}}
	path := filepath.Join(t.TempDir(), "svid.json")
	if err := st.Save(path); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Identities) != 2 || got.Identities[0].ID != id("/a") || got.Identities[0].Hint != "internal" || got.Identities[1].EntryID != "entry/b" ||
		!got.Bundle.Equal(ca.bundle()) || !got.Federated[far.td].Equal(far.bundle()) || len(got.JWTKeys) != 1 {
		t.Errorf("loaded %+v", got)
	}
	if err := NewSource().Set(got); err != nil {
		t.Error(err)
	}
	later, err := load(path, time.Now().Add(90*time.Minute))
	if err != nil || len(later.Identities) != 1 || later.Identities[0].ID != id("/b") {
		t.Errorf("with one expired: %+v, %v", later, err)
	}
	if _, err := load(path, time.Now().Add(3*time.Hour)); !errors.Is(err, ErrExpired) {
		t.Errorf("all expired: %v", err)
	}
	left, _ := os.ReadDir(filepath.Dir(path))
	if len(left) != 1 {
		t.Errorf("files left beside the state: %v", left)
	}
}

func TestLoadRefuses(t *testing.T) {
	ca := newCA(t, td)
	st := &State{Bundle: ca.bundle(), Identities: []Identity{ca.identity(id("/a"), time.Hour)}}
	path := filepath.Join(t.TempDir(), "svid.json")
	if err := st.Save(path); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path + ".missing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	for name, c := range map[string]struct {
		text string
		mode os.FileMode
	}{
		"readable by others": {string(good), 0o644},
		"cut short":          {string(good[:len(good)/2]), 0o600},
		"empty":              {"", 0o600},
		"unknown field":      {`{"x":1,` + string(good[1:]), 0o600},
		"text after the end": {string(good) + "{}", 0o600},
		"newer version":      {strings.Replace(string(good), `"version":1`, `"version":2`, 1), 0o600},
		"another identity":   {strings.Replace(string(good), "example.org/a", "example.org/b", 1), 0o600},
		"another domain":     {strings.Replace(string(good), `"trust_domain":"example.org"`, `"trust_domain":"example.net"`, 1), 0o600},
	} {
		if err := os.WriteFile(path, []byte(c.text), c.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func BenchmarkHandshake(b *testing.B) {
	ca := newCA(b, td)
	server, client := ServerTLS(ca.source(id("/billing")), anybody), ClientTLS(ca.source(id("/payment")), id("/billing"))
	for b.Loop() {
		if _, _, cerr, serr := shake(b, server, client); cerr != nil || serr != nil {
			b.Fatal(cerr, serr)
		}
	}
}

func BenchmarkVerifyPeer(b *testing.B) {
	ca := newCA(b, td)
	st, chain := ca.source(id("/a")).Current(), ca.identity(id("/b"), time.Hour).Chain
	b.ReportAllocs()
	for b.Loop() {
		if _, err := st.verifyPeer(chain, time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}
