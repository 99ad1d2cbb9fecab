package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/registry"
	"sallyport/internal/store"
)

var corp = spiffeid.RequireTrustDomainFromString("corp.example")

// signer signs what it is asked to.
type signer struct {
	control.Authority
	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newSigner(t *testing.T) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := &signer{key: key}
	s.root, err = s.sign(&x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *signer) sign(c *x509.Certificate, key crypto.PublicKey) (*x509.Certificate, error) {
	parent := s.root
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key, s.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func (s *signer) SignX509(_ context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration, dns []string) ([]*x509.Certificate, error) {
	c, err := s.sign(&x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{id.URL()}, DNSNames: dns,
		NotBefore: time.Now().Add(-time.Second), NotAfter: time.Now().Add(ttl)}, key)
	return []*x509.Certificate{c}, err
}

func (s *signer) SignJWT(_ context.Context, id spiffeid.ID, aud []string, _ time.Duration) (string, time.Time, time.Time, error) {
	return "token of " + id.Path() + " for " + strings.Join(aud, ","), time.Unix(1e9, 0), time.Unix(2e9, 0), nil
}

func (s *signer) X509Bundle() []*x509.Certificate { return []*x509.Certificate{s.root} }
func (s *signer) JWTKeys() []control.JWTKey       { return nil }

type noAudit struct{}

func (noAudit) Receive(context.Context, spiffeid.ID, spiffeid.ID, [][]byte) error { return nil }

// serveAdmin is an issuer's admin socket with a reviewed entry and an agent.
func serveAdmin(t *testing.T) (socket string) {
	t.Helper()
	dir, ctx := t.TempDir(), context.Background()
	s, err := store.OpenSQLite(ctx, filepath.Join(dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r, err := registry.New(registry.Config{Store: s, TrustDomain: corp, Log: slog.New(slog.DiscardHandler),
		Now: func() time.Time { return time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC) }})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Load(ctx); err != nil {
		t.Fatal(err)
	}
	id := func(p string) spiffeid.ID { return spiffeid.RequireFromPath(corp, p) }
	_, err = r.ApplyPolicies(ctx, &mesh.Policies{TrustDomain: corp, Entries: []mesh.Entry{{
		ID: "pay", SPIFFEID: id("/pay"), ParentID: id("/spire/agent/join_token/web-1"), X509TTL: time.Hour,
		Selectors: []mesh.Selector{{Type: "unix", Value: "uid:1000"}}, Origin: mesh.Origin{File: "entries.yaml", Line: 4},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.PutAgent(ctx, mesh.Agent{ID: id("/spire/agent/join_token/web-1"), AttestationType: "join_token", Serial: "77",
		Selectors: []mesh.Selector{{Type: "join_token", Value: "web-1"}}, ExpiresAt: time.Date(2036, 1, 2, 3, 4, 5, 0, time.UTC)}); err != nil {
		t.Fatal(err)
	}
	srv, err := control.NewServer(control.ServerConfig{TrustDomain: corp, Registry: r, Authority: newSigner(t), Audit: noAudit{},
		Keeper: r, Admins: authz.NewAdmins(r.Policies, slog.New(slog.DiscardHandler)), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "api.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- srv.ServeAdmin(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

func TestIdentityCommands(t *testing.T) {
	socket := serveAdmin(t)
	const node = "spiffe://corp.example/spire/agent/join_token/web-1"
	for _, tc := range []struct {
		line      string
		code      int
		out, says string
	}{
		{"entry create spiffe://corp.example/cron --id cron --parent " + node + " --selector unix:uid:5 --selector child:true --hint night --admin --dns cron.corp.example --jwt-ttl 90s", 0, `FIELD          VALUE
entry          cron
identity       spiffe://corp.example/cron
parent         spiffe://corp.example/spire/agent/join_token/web-1
selector       unix:uid:5
selector       child:true
JWT-SVID life  1m30s
DNS names      cron.corp.example
hint           night
admin          yes
kept in        the store, made 2026-11-22T08:00:00Z
`, ""},
		{"entry show pay", 0, `FIELD            VALUE
entry            pay
identity         spiffe://corp.example/pay
parent           spiffe://corp.example/spire/agent/join_token/web-1
selector         unix:uid:1000
X.509-SVID life  1h0m0s
kept in          a reviewed file
`, ""},
		{"entry list", 0, `IDENTITY                    PARENT                         SELECTORS              ENTRY
spiffe://corp.example/cron  /spire/agent/join_token/web-1  unix:uid:5 child:true  cron
spiffe://corp.example/pay   /spire/agent/join_token/web-1  unix:uid:1000          pay
`, ""},
		{"entry create spiffe://corp.example/cron --parent " + node + " --selector unix:uid:5 --selector child:true", 1, "", "already exists"},
		{"entry create spiffe://corp.example/x --parent " + node + " --selector unix:path:/bin/x", 1, "", "no boundary"},
		{"entry create nobody --parent " + node + " --selector unix:uid:5", 2, "", "scheme"},
		{"entry delete pay", 1, "", "entries.yaml:4"},
		{"entry delete cron", 0, "", "entry cron is deleted"},
		{"entry show cron", 1, "", "next: sallyport entry list"},
		{"agent list", 0, `AGENT                                               ATTESTED BY  SVID ENDS             STATE
spiffe://corp.example/spire/agent/join_token/web-1  join_token   2036-01-02T03:04:05Z  active
`, ""},
		{"agent show " + node, 0, `FIELD        VALUE
agent        spiffe://corp.example/spire/agent/join_token/web-1
attested by  join_token
serial       77
SVID ends    2036-01-02T03:04:05Z
banned       false
selector     join_token:web-1
`, ""},
		{"agent ban " + node, 0, "", "is banned"},
		{"agent list", 0, `AGENT                                               ATTESTED BY  SVID ENDS             STATE
spiffe://corp.example/spire/agent/join_token/web-1  join_token   2036-01-02T03:04:05Z  BANNED
`, ""},
		{"agent evict " + node, 0, "", "is forgotten"},
		{"agent show " + node, 1, "", "agent not found"},
		{"agent ban spiffe://corp.example/pay", 1, "", "is not an agent"},
		{"agent ban web-1", 2, "", "is not the SPIFFE ID of an agent"},
		{"svid mint spiffe://corp.example/once --audience a --audience b", 0, "token of /once for a,b\n", "until 2033-05-18T03:33:20Z"},
		{"svid mint spiffe://corp.example/once", 2, "", "--write"},
		{"svid mint spiffe://corp.example/spire/server --audience a", 1, "", "is under /spire"},
	} {
		var out, errs bytes.Buffer
		err := run(t.Context(), append(strings.Fields(tc.line), "--socket", socket), &out, &errs)
		if daemon.Code(err) != tc.code {
			t.Errorf("%s: exit %d (%v), want %d", tc.line, daemon.Code(err), err, tc.code)
		}
		if d := cmp.Diff(tc.out, out.String()); d != "" {
			t.Errorf("%s: %s", tc.line, d)
		}
		text := errs.String()
		if err != nil {
			text += err.Error()
		}
		if !strings.Contains(text, tc.says) {
			t.Errorf("%s: says %q, want %q in it", tc.line, text, tc.says)
		}
	}
}

func TestAMintedSVIDIsWritten(t *testing.T) {
	socket, dir := serveAdmin(t), filepath.Join(t.TempDir(), "new")
	var out, errs bytes.Buffer
	if err := run(t.Context(), []string{"svid", "mint", "spiffe://corp.example/once", "--ttl", "1m", "--write", dir, "--socket", socket}, &out, &errs); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{"key.pem": 0o600, "svid.pem": 0o644, "bundle.pem": 0o644} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode().Perm() != want || st.Size() == 0 {
			t.Errorf("%s: %v, %v, want mode %o", name, st, err, want)
		}
	}
}

func TestNoIssuerIsUnreachable(t *testing.T) {
	err := run(t.Context(), []string{"agent", "list", "--socket", filepath.Join(t.TempDir(), "none")}, new(bytes.Buffer), new(bytes.Buffer))
	if daemon.Code(err) != daemon.Unreachable {
		t.Errorf("exit %d (%v), want %d", daemon.Code(err), err, daemon.Unreachable)
	}
}
