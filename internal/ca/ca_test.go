package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/meshtest"
)

var (
	td     = spiffeid.RequireTrustDomainFromString("corp.example")
	web    = spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/web")
	anyKey = newKey()
)

func newKey() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
}

// records keeps audit records and fails when told to.
type records struct {
	mu   sync.Mutex // guards all and fail
	all  []audit.Record
	fail func(audit.Record) error
}

func (r *records) Append(x *audit.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		if err := r.fail(*x); err != nil {
			return err
		}
	}
	r.all = append(r.all, *x)
	return nil
}

func (r *records) reasons() string {
	var b []string
	for _, x := range r.all {
		b = append(b, x.Reason)
	}
	return strings.Join(b, " ")
}

func config(t testing.TB) Config {
	t.Helper()
	return Config{TrustDomain: td, Dir: filepath.Join(t.TempDir(), "ca"), Audit: new(records)}
}

func open(t testing.TB, cfg Config) *CA {
	t.Helper()
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func issue(t testing.TB, c *CA, req X509Request) []*x509.Certificate {
	t.Helper()
	d, err := c.Prepare(req)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := c.Sign(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

func verify(t *testing.T, chain []*x509.Certificate, roots []*x509.Certificate) {
	t.Helper()
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, CurrentTime: chain[0].NotBefore.Add(backdate)}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	for _, i := range chain[1:] {
		opts.Intermediates.AddCert(i)
	}
	if _, err := chain[0].Verify(opts); err != nil {
		t.Error(err)
	}
}

func TestIssueAnSVID(t *testing.T) {
	cfg := config(t)
	rec := cfg.Audit.(*records)
	c := open(t, cfg)
	for name, key := range map[string]crypto.PublicKey{
		"P-256": anyKey.Public(), "Ed25519": must(ed25519.GenerateKey(rand.Reader)), "RSA": must1(rsa.GenerateKey(rand.Reader, 2048)).Public(),
		"P-384": must1(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)).Public(),
	} {
		chain := issue(t, c, X509Request{ID: web, PublicKey: key, DNSNames: []string{"web.mesh.internal"}})
		if len(chain) != 2 || !samePublicKey(chain[0].PublicKey, key) {
			t.Errorf("%s: wrong chain", name)
		}
		verify(t, chain, c.Bundle().X509)
		leaf := chain[0]
		if got := leaf.NotAfter.Sub(leaf.NotBefore); got != time.Hour+backdate {
			t.Errorf("%s: life of %v", name, got)
		}
		if leaf.SerialNumber.BitLen() != 128 {
			t.Errorf("%s: serial of %d bits", name, leaf.SerialNumber.BitLen())
		}
	}
	if got := rec.reasons(); got != strings.TrimSpace(strings.Repeat("intent done ", 4)) {
		t.Errorf("audit has %s", got)
	}
	if x := rec.all[0]; x.Kind != audit.KindIssue || x.Dst != web.String() || !strings.Contains(x.Detail, "x509 serial") {
		t.Errorf("audit has %+v", x)
	}
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}
}

func must[A, B any](a A, _ B, err error) A {
	if err != nil {
		panic(err)
	}
	return a
}

func must1[A any](a A, err error) A { return must(a, 0, err) }

func TestAgentAndServerHaveTheirOwnDoors(t *testing.T) {
	c := open(t, config(t))
	agent := spiffeid.RequireFromString("spiffe://corp.example/spire/agent/join_token/node-1")
	server := spiffeid.RequireFromString("spiffe://corp.example/spire/server")
	for _, id := range []spiffeid.ID{agent, server, spiffeid.RequireFromString("spiffe://corp.example/spire")} {
		if _, err := c.Prepare(X509Request{ID: id, PublicKey: anyKey.Public()}); !errors.Is(err, ErrRefused) {
			t.Errorf("%s through Prepare: %v", id, err)
		}
	}
	for _, id := range []string{"spiffe://corp.example/spire/agent/join_token", "spiffe://corp.example/spire/server", "spiffe://corp.example/ns/a", "spiffe://other.example/spire/agent/x/y"} {
		if _, err := c.DraftAgent(spiffeid.RequireFromString(id), anyKey.Public(), 0); !errors.Is(err, ErrRefused) {
			t.Errorf("%s through DraftAgent: %v", id, err)
		}
	}
	for want, draft := range map[spiffeid.ID]func() (Draft, error){
		agent:  func() (Draft, error) { return c.DraftAgent(agent, anyKey.Public(), 2*time.Minute) },
		server: func() (Draft, error) { return c.DraftServer(anyKey.Public(), 0, "issuer.corp.example") },
	} {
		d, err := draft()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := c.Sign(t.Context(), d)
		if err != nil || chain[0].URIs[0].String() != want.String() {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestPrepareRefuses(t *testing.T) {
	c := open(t, config(t))
	inter := c.current.Load().intermediate
	for name, tc := range map[string]struct {
		req  X509Request
		want string
	}{
		"no ID":                       {X509Request{PublicKey: anyKey.Public()}, "no SPIFFE ID"},
		"another trust domain":        {X509Request{ID: spiffeid.RequireFromString("spiffe://other.example/a"), PublicKey: anyKey.Public()}, "not in trust domain"},
		"the trust domain itself":     {X509Request{ID: td.ID(), PublicKey: anyKey.Public()}, "no path"},
		"an ID that is too long":      {X509Request{ID: spiffeid.RequireFromString("spiffe://corp.example/" + strings.Repeat("a", 2048)), PublicKey: anyKey.Public()}, "at most 2048"},
		"no key":                      {X509Request{ID: web}, "its key is a <nil>"},
		"a nil key":                   {X509Request{ID: web, PublicKey: (*ecdsa.PublicKey)(nil)}, "P-256"},
		"a key without a point":       {X509Request{ID: web, PublicKey: &ecdsa.PublicKey{Curve: elliptic.P256()}}, "not a point"},
		"a P-521 key":                 {X509Request{ID: web, PublicKey: must1(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)).Public()}, "P-256 or P-384"},
		"a short RSA key":             {X509Request{ID: web, PublicKey: must1(rsa.GenerateKey(rand.Reader, 1024)).Public()}, "2048"},
		"an empty RSA key":            {X509Request{ID: web, PublicKey: &rsa.PublicKey{}}, "2048"},
		"a short Ed25519 key":         {X509Request{ID: web, PublicKey: ed25519.PublicKey("x")}, "wrong length"},
		"a private key":               {X509Request{ID: web, PublicKey: anyKey}, "want EC"},
		"the key of the intermediate": {X509Request{ID: web, PublicKey: inter.PublicKey}, "one of the CA"},
		"the key of the root":         {X509Request{ID: web, PublicKey: c.Bundle().X509[0].PublicKey}, "one of the CA"},
		"the key for tokens":          {X509Request{ID: web, PublicKey: c.Bundle().JWT[0].PublicKey}, "one of the CA"},
		"a life below the floor":      {X509Request{ID: web, PublicKey: anyKey.Public(), TTL: 59 * time.Second}, "floor of 1m0s"},
		"a negative life":             {X509Request{ID: web, PublicKey: anyKey.Public(), TTL: -time.Hour}, "floor"},
		"a wildcard":                  {X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{"*.corp.example"}}, "byte"},
		"an upper-case DNS name":      {X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{"Web"}}, "lower-case"},
		"an empty DNS name":           {X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{""}}, "1 to 253"},
		"a final dot":                 {X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{"web."}}, "empty"},
		"an address as DNS name":      {X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{"10.0.0.1"}}, "address"},
		"a NUL in a DNS name":         {X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{"a\x00.b"}}, "byte"},
		"a DNS name twice":            {X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{"a", "a"}}, "twice"},
		"too many DNS names":          {X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: make([]string, 33)}, "more than 32"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := c.Prepare(tc.req)
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want a refusal with %q", err, tc.want)
			}
			if _, err := c.Sign(t.Context(), d); !errors.Is(err, ErrDraft) {
				t.Errorf("what a refusal returned was signed: %v", err)
			}
		})
	}
}

func TestDraftIsRedeemedOnceAndAtItsCA(t *testing.T) {
	now := time.Now()
	cfg := config(t)
	cfg.Now = func() time.Time { return now }
	c, other := open(t, cfg), open(t, config(t))
	prepare := func() Draft { return must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()})) }

	d := prepare()
	if _, err := other.Sign(t.Context(), d); !errors.Is(err, ErrDraft) {
		t.Errorf("at another CA: %v", err)
	}
	twin := d
	if _, err := c.Sign(t.Context(), d); err != nil {
		t.Error(err)
	}
	for _, again := range []Draft{d, twin} {
		if _, err := c.Sign(t.Context(), again); !errors.Is(err, ErrDraft) {
			t.Errorf("a second time: %v", err)
		}
	}
	if _, err := c.Sign(t.Context(), Draft{}); !errors.Is(err, ErrDraft) {
		t.Errorf("the zero value: %v", err)
	}
	old := prepare()
	now = now.Add(draftLife + time.Second)
	if _, err := c.Sign(t.Context(), old); !errors.Is(err, ErrDraft) {
		t.Errorf("an old draft: %v", err)
	}

	var wg sync.WaitGroup
	d = prepare()
	signed := make(chan bool, 16)
	for range 16 {
		wg.Go(func() {
			_, err := c.Sign(t.Context(), d)
			signed <- err == nil
		})
	}
	wg.Wait()
	close(signed)
	n := 0
	for ok := range signed {
		if ok {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d signatures for one draft", n)
	}
}

func TestCallerCannotChangeADraft(t *testing.T) {
	c := open(t, config(t))
	key := newKey().PublicKey
	want := publicDER(&key)
	names := []string{"web.corp.example"}
	d := must1(c.Prepare(X509Request{ID: web, PublicKey: &key, DNSNames: names}))
	key = newKey().PublicKey
	names[0] = "evil.example"
	chain, err := c.Sign(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(chain[0].RawSubjectPublicKeyInfo, want) || chain[0].DNSNames[0] != "web.corp.example" {
		t.Error("the certificate is not what was linted")
	}
}

func TestNothingIsSignedWithoutARecord(t *testing.T) {
	boom := errors.New("disk full")
	for _, reason := range []string{"intent", "done"} {
		rec := &records{fail: func(x audit.Record) error {
			if x.Reason == reason {
				return boom
			}
			return nil
		}}
		cfg := config(t)
		cfg.Audit = rec
		c := open(t, cfg)
		d := must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()}))
		if chain, err := c.Sign(t.Context(), d); !errors.Is(err, boom) || chain != nil {
			t.Errorf("%s: got %v %v", reason, chain, err)
		}
		if token, _, _, err := c.SignJWT(t.Context(), web, []string{"a"}, 0); !errors.Is(err, boom) || token != "" {
			t.Errorf("%s: got %q %v", reason, token, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cfg := config(t)
	c := open(t, cfg)
	d := must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()}))
	if _, err := c.Sign(ctx, d); !errors.Is(err, context.Canceled) || len(cfg.Audit.(*records).all) != 0 {
		t.Errorf("with a cancelled context: %v", err)
	}
}

func TestLeafNeverOutlivesTheIntermediate(t *testing.T) {
	now := time.Now()
	cfg := config(t)
	cfg.Now = func() time.Time { return now }
	c := open(t, cfg)
	end := c.Status().IntermediateExpires
	chain := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public(), TTL: 1000 * time.Hour})
	if !chain[0].NotAfter.Equal(end) {
		t.Errorf("leaf ends %v, intermediate %v", chain[0].NotAfter, end)
	}
	now = end.Add(time.Second)
	if _, err := c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()}); !errors.Is(err, ErrExpired) {
		t.Errorf("after the end: %v", err)
	}
	now = end.Add(-8 * 24 * time.Hour)
	if _, _, _, err := c.SignJWT(t.Context(), web, []string{"a"}, 0); !errors.Is(err, ErrExpired) {
		t.Errorf("before the beginning: %v", err)
	}
}

func TestShortLivesNeedPermission(t *testing.T) {
	cfg := config(t)
	cfg.AllowShort = true
	c := open(t, cfg)
	chain := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public(), TTL: time.Second})
	if got := chain[0].NotAfter.Sub(chain[0].NotBefore); got != time.Second+backdate {
		t.Errorf("life of %v", got)
	}
	if _, err := c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public(), TTL: time.Millisecond}); !errors.Is(err, ErrRefused) {
		t.Errorf("a millisecond: %v", err)
	}
}

// passphrases are those that a CA is tried with. Each key that has one costs
// 600,000 rounds of PBKDF2, which take five seconds under the race detector.
func passphrases() []string {
	if meshtest.Race {
		return []string{""}
	}
	return []string{"", "correct horse"}
}

func TestReopenKeepsEverything(t *testing.T) {
	for _, pass := range passphrases() {
		cfg := config(t)
		cfg.Passphrase = []byte(pass)
		c := open(t, cfg)
		before, status := c.Bundle(), c.Status()
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "another process has it open; next: stop the other issuer") {
			t.Errorf("a second open: %v", err)
		}
		c.Close()
		again := open(t, cfg)
		if again.Status() != status || !again.Bundle().X509[0].Equal(before.X509[0]) || again.Bundle().Sequence != before.Sequence {
			t.Error("another CA came back")
		}
		filepath.WalkDir(cfg.Dir, func(path string, d fs.DirEntry, err error) error {
			info, _ := d.Info()
			want := fs.FileMode(0o600)
			switch {
			case d.IsDir():
				want = 0o700
			case strings.HasSuffix(path, ".crt"):
				want = 0o644
			}
			if err != nil || info.Mode().Perm() != want {
				t.Errorf("%s has mode %v, want %v", path, info.Mode().Perm(), want)
			}
			if strings.HasSuffix(path, ".key") {
				data, _ := os.ReadFile(path)
				if bytes.Contains(data, []byte("BEGIN "+encryptedPEM)) != (pass != "") {
					t.Errorf("%s: wrong form of key", path)
				}
			}
			return nil
		})
		again.Close()
		if _, err := again.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()}); err == nil {
			t.Error("a closed CA prepares")
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	rootKey := func(cfg Config) string { return filepath.Join(cfg.Dir, "root.key") }
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	foreign := func(t *testing.T) Config {
		cfg := config(t)
		open(t, cfg).Close()
		return cfg
	}
	for name, tc := range map[string]struct {
		harm func(*testing.T, *Config)
		want string
	}{
		"another trust domain": {func(_ *testing.T, c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("other.example") },
			`of trust domain "corp.example", not of "other.example"; next: set trust_domain to corp.example`},
		"a key that others may read": {func(t *testing.T, c *Config) { os.Chmod(rootKey(*c), 0o644) }, "has mode 0644, which lets other users in; next: chmod 0600"},
		"a directory that is open":   {func(t *testing.T, c *Config) { os.Chmod(c.Dir, 0o755) }, "has mode 0755, which lets other users in; next: chmod 0700"},
		"a missing key":              {func(t *testing.T, c *Config) { os.Remove(rootKey(*c)) }, "root.key is missing; next: restore"},
		"a damaged key":              {func(t *testing.T, c *Config) { write(t, rootKey(*c), "x") }, "damaged: no PKCS#8 PEM block; next:"},
		"a key of nonsense": {func(t *testing.T, c *Config) {
			write(t, rootKey(*c), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
		}, "root.key is damaged; next:"},
		"a huge key file":             {func(t *testing.T, c *Config) { write(t, rootKey(*c), strings.Repeat("x", 1<<17)) }, "not a key file"},
		"a passphrase for plain keys": {func(t *testing.T, c *Config) { c.Passphrase = []byte("x") }, "not encrypted although a passphrase is set; next:"},
		"a key of another CA": {func(t *testing.T, c *Config) {
			data, _ := os.ReadFile(rootKey(foreign(t)))
			write(t, rootKey(*c), string(data))
		}, "does not belong to its certificate; next:"},
		"a root of another CA": {func(t *testing.T, c *Config) {
			for _, f := range []string{"root.crt", "root.key"} {
				data, _ := os.ReadFile(filepath.Join(foreign(t).Dir, f))
				write(t, filepath.Join(c.Dir, f), string(data))
			}
		}, "next: restore both from one backup"},
		"a leaf in place of the root": {func(t *testing.T, c *Config) {
			other := open(t, config(t))
			leaf := issue(t, other, X509Request{ID: web, PublicKey: anyKey.Public()})[0]
			write(t, filepath.Join(c.Dir, "root.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})))
		}, "is not one of this CA: it does not say cA"},
		"a missing certificate":       {func(t *testing.T, c *Config) { os.Remove(filepath.Join(c.Dir, "root.crt")) }, "root.crt is missing; next:"},
		"a damaged certificate":       {func(t *testing.T, c *Config) { write(t, filepath.Join(c.Dir, "root.crt"), "x") }, "damaged: want exactly one PEM certificate; next:"},
		"a missing state":             {func(t *testing.T, c *Config) { os.Remove(filepath.Join(c.Dir, stateFile)) }, "is there but state.json is not; next: restore state.json"},
		"a damaged state":             {func(t *testing.T, c *Config) { write(t, filepath.Join(c.Dir, stateFile), "{") }, "state.json is damaged"},
		"a state with a path":         {func(t *testing.T, c *Config) { harmState(t, *c, func(s *state) { s.Intermediate = "../x" }) }, `"../x" is not a name`},
		"a state of the future":       {func(t *testing.T, c *Config) { harmState(t, *c, func(s *state) { s.Version = 2 }) }, "version 2, this program knows 1"},
		"a state without a token key": {func(t *testing.T, c *Config) { harmState(t, *c, func(s *state) { s.JWT = nil }) }, "no active JWT key"},
		"an expired root": {func(t *testing.T, c *Config) {
			c.Now = func() time.Time { return time.Now().Add(366 * 24 * time.Hour) }
		},
			"the root certificate expired at"},
		"a clock that is a day behind": {func(t *testing.T, c *Config) { c.Now = func() time.Time { return time.Now().Add(-24 * time.Hour) } },
			"before the root certificate begins"},
		"a KMS we do not know":     {func(t *testing.T, c *Config) { c.KMS = "awskms:key-id=1;pin=hunter2" }, `ca.kms: scheme "awskms" is not supported; next: use softkms:`},
		"a relative KMS path":      {func(t *testing.T, c *Config) { c.KMS = "softkms:path=keys" }, "absolute"},
		"leaves beyond a sixth":    {func(t *testing.T, c *Config) { c.X509TTL = 100 * time.Hour }, "ca.x509_ttl: 100h0m0s is more than a sixth"},
		"a life below the floor":   {func(t *testing.T, c *Config) { c.JWTTTL = time.Second }, "ca.jwt_ttl: 1s is below the floor"},
		"no place and no recorder": {func(t *testing.T, c *Config) { c.Dir, c.Audit = "", nil }, "ca.audit: missing"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			open(t, cfg).Close()
			tc.harm(t, &cfg)
			c, err := Open(t.Context(), cfg)
			if err == nil {
				c.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Error("the error holds a secret")
			}
		})
	}
}

func harmState(t *testing.T, cfg Config, harm func(*state)) {
	t.Helper()
	path := filepath.Join(cfg.Dir, stateFile)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var s state
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	harm(&s)
	if data, err = json.Marshal(s); err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// withPassphrase leaves a test of passphrases to the run without the race
// detector.
func withPassphrase(t *testing.T) {
	t.Helper()
	if len(passphrases()) == 1 {
		t.Skip("under the race detector PBKDF2 takes too long")
	}
}

func TestWrongPassphrase(t *testing.T) {
	withPassphrase(t)
	cfg := config(t)
	cfg.Passphrase = []byte("right")
	open(t, cfg).Close()
	for pass, want := range map[string]string{
		"":      "is encrypted and no passphrase is set; next: set the passphrase",
		"wrong": "the passphrase is wrong or the file is damaged; next:",
	} {
		cfg.Passphrase = []byte(pass)
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want an error with %q", pass, err, want)
		}
	}
}

func TestKeysInAnotherDirectory(t *testing.T) {
	for _, form := range []string{"softkms:path=", "softkms:", "file://", ""} {
		cfg := config(t)
		keys := filepath.Join(t.TempDir(), "keys")
		cfg.KMS = form + keys
		open(t, cfg).Close()
		if found, _ := filepath.Glob(filepath.Join(keys, "*.key")); len(found) != 3 {
			t.Errorf("%s: found %v", cfg.KMS, found)
		}
		if found, _ := filepath.Glob(filepath.Join(cfg.Dir, "*.key")); len(found) != 0 {
			t.Errorf("%s: found %v", cfg.KMS, found)
		}
	}
}

func TestRenewal(t *testing.T) {
	cfg := config(t)
	cfg.AllowShort = true
	cfg.RootTTL, cfg.IntermediateTTL, cfg.X509TTL, cfg.JWTTTL = time.Hour, time.Minute, 5*time.Second, 5*time.Second
	synctest.Test(t, func(t *testing.T) {
		c, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		root, first := c.Bundle().X509[0], c.Status()
		chain := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})

		changed := c.Changed()
		<-changed // half of the life: the next key is published, not used
		b := c.Bundle()
		if len(b.JWT) != 2 || c.Status() != first || b.Sequence != 2 {
			t.Errorf("at half life: %d keys, %+v, sequence %d", len(b.JWT), c.Status(), b.Sequence)
		}
		next := b.JWT[1].KeyID

		changed = c.Changed()
		<-changed // five sixths: both are used
		s := c.Status()
		if s.IntermediateSerial == first.IntermediateSerial || s.KeyID != next || !c.Bundle().X509[0].Equal(root) {
			t.Errorf("at 5/6: %+v after %+v", s, first)
		}
		if got := time.Until(first.IntermediateExpires).Round(time.Second); got != 10*time.Second {
			t.Errorf("renewed %v before the end", got)
		}
		verify(t, chain, c.Bundle().X509)
		verify(t, issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}), c.Bundle().X509)

		for range 6 { // retired keys leave the bundle, and files do not pile up
			<-c.Changed()
		}
		if n := len(c.Bundle().JWT); n > 3 {
			t.Errorf("%d JWT keys", n)
		}
		for _, k := range c.Bundle().JWT {
			if !k.ExpiresAt.After(time.Now().Add(-2 * time.Second)) {
				t.Errorf("key %s expired at %v", k.KeyID, k.ExpiresAt)
			}
		}
		c.Changed() // waits for the end of the step that closed the channel
		if files, _ := filepath.Glob(filepath.Join(cfg.Dir, "intermediate-*")); len(files) != 2 {
			t.Errorf("files %v", files)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestIntermediateThatExpiredWhileDownIsRenewedOnOpen(t *testing.T) {
	cfg := config(t)
	first := open(t, cfg)
	before := first.Status()
	first.Close()
	cfg.Now = func() time.Time { return time.Now().Add(30 * 24 * time.Hour) }
	c := open(t, cfg)
	if s := c.Status(); s.IntermediateSerial == before.IntermediateSerial || s.KeyID == before.KeyID || s.RootExpires != before.RootExpires {
		t.Errorf("got %+v after %+v", s, before)
	}
	if n := len(c.Bundle().JWT); n != 1 {
		t.Errorf("%d JWT keys, the old one is long expired", n)
	}
	issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
	c.Close()
	cfg.Now = time.Now
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "before the intermediate certificate begins") || !strings.Contains(err.Error(), "; next: set the clock") {
		t.Errorf("with the clock set back: %v", err)
	}
}

func TestRootThatNearsItsEndIsReplacedThoughNobodyConfirms(t *testing.T) {
	cfg := config(t)
	open(t, cfg).Close()
	now := time.Now().Add(363 * 24 * time.Hour)
	cfg.Now = func() time.Time { return now }
	c := open(t, cfg)
	s := c.Status()
	if !s.IntermediateExpires.Equal(s.RootExpires) || c.Rotation().Phase != Prepared {
		t.Errorf("got %+v, %s: want an intermediate that ends with the root, and the next root prepared", s, c.Rotation().Phase)
	}
	if err := c.renew(t.Context()); err != nil {
		t.Error(err)
	}
	if got := c.Status(); c.Rotation().Phase != Activated || !got.RootExpires.After(now.Add(364*24*time.Hour)) || got.IntermediateExpires.Before(now.Add(6*24*time.Hour)) {
		t.Errorf("got %+v, %s", got, c.Rotation().Phase)
	}
}

func TestJWT(t *testing.T) {
	cfg := config(t)
	c := open(t, cfg)
	token, issued, expires, err := c.SignJWT(t.Context(), web, []string{"spiffe://corp.example/ns/shop/sa/payment", "b"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	key := c.Bundle().JWT[0]
	got, err := jwt.ParseWithClaims(token, &jwt.RegisteredClaims{}, func(tok *jwt.Token) (any, error) {
		if tok.Header["kid"] != key.KeyID || tok.Header["typ"] != "JWT" || tok.Header["alg"] != "ES256" || len(tok.Header) != 3 {
			t.Errorf("header %v", tok.Header)
		}
		return key.PublicKey, nil
	}, jwt.WithValidMethods([]string{"ES256"}), jwt.WithAudience("b"), jwt.WithExpirationRequired(), jwt.WithIssuedAt())
	if err != nil {
		t.Fatal(err)
	}
	claims := got.Claims.(*jwt.RegisteredClaims)
	if claims.Subject != web.String() || len(claims.Audience) != 2 || !claims.ExpiresAt.Equal(expires) || !claims.IssuedAt.Equal(issued) || expires.Sub(issued) != 5*time.Minute {
		t.Errorf("claims %+v, %v to %v", claims, issued, expires)
	}
	if rec := cfg.Audit.(*records); rec.reasons() != "intent done" || strings.Contains(rec.all[1].Detail, token) {
		t.Errorf("audit %+v", rec.all)
	}
	for name, tc := range map[string]struct {
		id  spiffeid.ID
		aud []string
		ttl time.Duration
	}{
		"no audience":          {web, nil, 0},
		"an empty audience":    {web, []string{""}, 0},
		"an audience twice":    {web, []string{"a", "a"}, 0},
		"too many audiences":   {web, make([]string, 17), 0},
		"a long audience":      {web, []string{strings.Repeat("a", 257)}, 0},
		"another trust domain": {spiffeid.RequireFromString("spiffe://other.example/a"), []string{"a"}, 0},
		"no ID":                {spiffeid.ID{}, []string{"a"}, 0},
		"the trust domain":     {td.ID(), []string{"a"}, 0},
		"an agent":             {spiffeid.RequireFromString("spiffe://corp.example/spire/agent/x/y"), []string{"a"}, 0},
		"a long life":          {web, []string{"a"}, 25 * time.Hour},
		"a short life":         {web, []string{"a"}, time.Second},
		"a negative life":      {web, []string{"a"}, -time.Second},
	} {
		if token, _, _, err := c.SignJWT(t.Context(), tc.id, tc.aud, tc.ttl); !errors.Is(err, ErrRefused) || token != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOpenSSLVerifies asks the other common implementation.
func TestOpenSSLVerifies(t *testing.T) {
	c := open(t, config(t))
	dir := t.TempDir()
	chain := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{"web.mesh.internal"}})
	put := func(name string, cert *x509.Certificate) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	meshtest.Need(t, "openssl")
	root, inter, leaf := put("root", c.Bundle().X509[0]), put("inter", chain[1]), put("leaf", chain[0])
	for _, purpose := range []string{"sslserver", "sslclient"} {
		out, err := exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", root, "-untrusted", inter, leaf).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", purpose, err, out)
		}
	}
	if out, err := exec.CommandContext(t.Context(), "openssl", "verify", "-CAfile", root, leaf).CombinedOutput(); err == nil {
		t.Errorf("verified without the intermediate: %s", out)
	}
	out, err := exec.CommandContext(t.Context(), "openssl", "x509", "-in", leaf, "-noout", "-text").CombinedOutput()
	for _, want := range []string{"Subject Alternative Name: critical", "URI:" + web.String(), "Key Usage: critical", "CA:FALSE"} {
		if err != nil || !bytes.Contains(out, []byte(want)) {
			t.Errorf("openssl does not see %q: %v\n%s", want, err, out)
		}
	}
}

func TestOpenSSLOpensAnEncryptedKey(t *testing.T) {
	meshtest.Need(t, "openssl")
	withPassphrase(t)
	enc := config(t)
	enc.Passphrase = []byte("correct horse")
	open(t, enc)
	cmd := exec.CommandContext(t.Context(), "openssl", "pkey", "-in", filepath.Join(enc.Dir, "root.key"), "-passin", "stdin", "-noout", "-check")
	cmd.Stdin = strings.NewReader("correct horse\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("openssl does not open the encrypted key: %v: %s", err, out)
	}
}

func TestConcurrentIssueDuringRenewal(t *testing.T) {
	c := open(t, config(t))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				d, err := c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()})
				if err != nil {
					t.Error(err)
					return
				}
				chain, err := c.Sign(t.Context(), d)
				if err != nil {
					t.Error(err)
					return
				}
				if err := chain[0].CheckSignatureFrom(chain[1]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 10 {
		c.mu.Lock()
		if err := c.rotate(t.Context(), c.current.Load(), time.Now()); err != nil {
			t.Error(err)
		}
		c.mu.Unlock()
	}
	close(stop)
	wg.Wait()
}

func FuzzPrepare(f *testing.F) {
	f.Add("/ns/shop/sa/web", "web.mesh.internal", int64(time.Hour), []byte("k"))
	f.Add("/spire/server", "*", int64(-1), []byte{})
	f.Add("/spire", "1.2.3.4", int64(0), publicDER(anyKey.Public()))
	cfg := config(f)
	cfg.AllowShort = true
	c, err := Open(context.Background(), cfg)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { c.Close() })
	f.Fuzz(func(t *testing.T, path, dns string, ttl int64, key []byte) {
		id, _ := spiffeid.FromPath(td, path)
		req := X509Request{ID: id, TTL: time.Duration(ttl), PublicKey: anyKey.Public()}
		if dns != "" {
			req.DNSNames = strings.Split(dns, ",")
		}
		if k, err := x509.ParsePKIXPublicKey(key); err == nil {
			req.PublicKey = k
		}
		d, err := c.Prepare(req)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				t.Errorf("got %v", err)
			}
			return
		}
		chain, err := c.Sign(context.Background(), d)
		if err != nil {
			t.Fatal(err)
		}
		leaf := chain[0]
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != id.String() || leaf.IsCA || strings.HasPrefix(id.Path(), "/spire/") ||
			leaf.NotAfter.After(chain[1].NotAfter) || !slices.Equal(leaf.DNSNames, req.DNSNames) {
			t.Errorf("signed %v %v for %+v", leaf.URIs, leaf.DNSNames, req)
		}
	})
}

func BenchmarkSign(b *testing.B) {
	c := open(b, config(b))
	c.cfg.Audit = nothing{}
	s := c.current.Load()
	real, err := s.service.(interface{ GetSigner() (crypto.Signer, error) }).GetSigner()
	if err != nil {
		b.Fatal(err)
	}
	request := X509Request{ID: web, PublicKey: anyKey.Public()}
	d := must1(c.Prepare(request)).d
	for _, x := range []struct {
		name string
		do   func()
	}{
		{"raw", func() {
			template := *d.template
			must1(x509.CreateCertificate(rand.Reader, &template, s.intermediate, d.template.PublicKey, real))
		}},
		{"prepare", func() { must1(c.Prepare(request)) }},
		{"whole", func() { must1(c.Sign(b.Context(), must1(c.Prepare(request)))) }},
		{"softcas", func() {
			d := must1(c.Prepare(request)).d
			must1(d.signTemplate())
		}},
	} {
		// CPU time counts beside wall time: it says the same on a busy machine.
		b.Run(x.name, func(b *testing.B) {
			before := cpu(b)
			for b.Loop() {
				x.do()
			}
			b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
		})
	}
}

func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

type nothing struct{}

func (nothing) Append(*audit.Record) error { return nil }
