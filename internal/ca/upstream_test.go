package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"math/big"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"

	"sallyport/internal/audit"
)

// An above is an upstream authority in this process: a root, an intermediate and
// what it does to our certificates.
type above struct {
	now func() time.Time

	mu    sync.Mutex // guards the fields below
	key   *ecdsa.PrivateKey
	chain []*x509.Certificate // intermediate, root
	edit  func(*x509.Certificate)
	sends func([]*x509.Certificate) []*x509.Certificate
	fail  error
	asked int
}

func newAbove(t *testing.T, now func() time.Time) *above {
	a := &above{now: now}
	a.renewRoot(t, "first")
	return a
}

// renewRoot gives the authority another root.
func (a *above) renewRoot(t *testing.T, name string) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	end := a.now().AddDate(1, 0, 0)
	rootKey := newKey()
	root := a.authority(t, name+" root", rootKey, nil, nil, end)
	a.key = newKey()
	a.chain = []*x509.Certificate{a.authority(t, name+" mid", a.key, root, rootKey, end), root}
}

func (a *above) authority(t *testing.T, name string, key *ecdsa.PrivateKey, parent *x509.Certificate, by crypto.Signer, end time.Time) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, NotBefore: a.now().Add(-time.Hour), NotAfter: end,
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: 4, KeyUsage: x509.KeyUsageCertSign,
	}
	if parent == nil {
		parent, by = template, key
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (a *above) CreateCertificate(req *apiv1.CreateCertificateRequest) (*apiv1.CreateCertificateResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked++
	if a.fail != nil {
		return nil, a.fail
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: req.CSR.Subject, URIs: req.CSR.URIs, PublicKey: req.CSR.PublicKey,
		NotBefore: a.now().Add(-time.Minute), NotAfter: a.now().Add(req.Lifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: 1, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if a.edit != nil {
		a.edit(template)
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, a.chain[0], template.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		return nil, err
	}
	chain := a.chain
	if a.sends != nil {
		chain = a.sends(chain)
	}
	return &apiv1.CreateCertificateResponse{Certificate: cert, CertificateChain: chain}, nil
}

func (*above) RenewCertificate(*apiv1.RenewCertificateRequest) (*apiv1.RenewCertificateResponse, error) {
	return nil, apiv1.NotImplementedError{}
}

func (*above) RevokeCertificate(*apiv1.RevokeCertificateRequest) (*apiv1.RevokeCertificateResponse, error) {
	return nil, apiv1.NotImplementedError{}
}

// under is a CA below such an authority, with a clock that tests move and
// proxies that trust and show what they are told.
type under struct {
	*CA
	cfg     Config
	up      *above
	clock   time.Time
	holders []Holder
}

func newUnder(t *testing.T) *under {
	t.Helper()
	u := &under{cfg: config(t), clock: time.Now()}
	u.up = newAbove(t, func() time.Time { return u.clock })
	u.cfg.Now = u.up.now
	u.cfg.Upstream = u.up
	u.cfg.Holders = func() ([]Holder, bool) { return u.holders, true }
	u.CA = open(t, u.cfg)
	return u
}

// confirm lets a proxy trust the whole bundle, and show what signs.
func (u *under) confirm() {
	h := Holder{Name: "proxy", Shows: []string{RootID(u.current.Load().root)}, Trusts: idsOf(u.Bundle().X509)}
	for _, k := range u.Bundle().JWT {
		h.Trusts = append(h.Trusts, k.KeyID)
	}
	u.holders = []Holder{h}
}

func (u *under) step(t *testing.T, want Phase) {
	t.Helper()
	if err := u.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := u.Rotation().Phase; got != want {
		t.Fatalf("phase %s, want %s", got, want)
	}
}

func (u *under) leaf(t *testing.T) []*x509.Certificate {
	t.Helper()
	chain := issue(t, u.CA, X509Request{ID: web, PublicKey: anyKey.Public()})
	verify(t, chain, u.Bundle().X509)
	return chain
}

func TestUnderAnUpstreamAuthority(t *testing.T) {
	u := newUnder(t)
	if chain := u.leaf(t); len(chain) != 3 || !chain[2].Equal(u.up.chain[0]) {
		t.Errorf("a chain of %d", len(chain))
	}
	if b := u.Bundle(); len(b.X509) != 1 || !b.X509[0].Equal(u.up.chain[1]) {
		t.Errorf("the bundle has %d roots", len(b.X509))
	}
	before := u.Status()
	u.clock = u.clock.Add(u.CA.cfg.IntermediateTTL * 5 / 6).Add(time.Minute)
	u.step(t, Steady)
	if after := u.Status(); after.IntermediateSerial == before.IntermediateSerial || after.KeyID == before.KeyID {
		t.Errorf("nothing was renewed: %+v", after)
	}
	u.leaf(t)
	// One that an operator asks for needs no trust of anyone.
	before = u.Status()
	if r, err := u.Rotate(t.Context(), ByHand, false); err != nil || r.Phase != Prepared {
		t.Fatalf("%+v, %v", r, err)
	}
	u.confirm()
	if r, err := u.Rotate(t.Context(), ByHand, false); err != nil || r.Phase != Steady {
		t.Fatalf("%+v, %v", r, err)
	}
	if u.Status().IntermediateSerial == before.IntermediateSerial {
		t.Error("the old intermediate signs")
	}
	u.leaf(t)
	if _, err := u.Emergency(t.Context()); !errors.Is(err, ErrGate) {
		t.Errorf("an emergency under the same root: %v", err)
	}
	serial := u.Status().IntermediateSerial
	u.CA.Close()
	u.CA = open(t, u.cfg)
	if u.Status().IntermediateSerial != serial {
		t.Error("another intermediate after the restart")
	}
	u.leaf(t)
	for pattern, want := range map[string]int{"root*.key": 0, "root*.crt": 1, "intermediate*.crt": 1, "intermediate*.key": 1, "intermediate*.chain": 1} {
		if found, _ := filepath.Glob(filepath.Join(u.cfg.Dir, pattern)); len(found) != want {
			t.Errorf("%s: %v, want %d", pattern, found, want)
		}
	}
}

func TestTheUpstreamRootChanges(t *testing.T) {
	u := newUnder(t)
	first := u.current.Load().root
	u.confirm()
	u.up.renewRoot(t, "second")
	u.clock = u.clock.Add(u.CA.cfg.IntermediateTTL * 5 / 6).Add(time.Minute)
	u.step(t, Prepared)
	if b := u.Bundle(); len(b.X509) != 2 || !b.X509[0].Equal(first) || !u.current.Load().root.Equal(first) {
		t.Fatalf("the new root is not appended, or signs: %d roots", len(b.X509))
	}
	u.leaf(t)
	u.step(t, Prepared) // the proxy does not trust it yet
	u.confirm()
	u.step(t, Activated)
	if u.current.Load().root.Equal(first) {
		t.Error("the old root signs")
	}
	u.leaf(t)
	if _, err := u.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !u.current.Load().root.Equal(first) {
		t.Error("the new root signs after the rollback")
	}
	u.leaf(t)
	u.confirm()
	u.clock = u.clock.Add(time.Hour)
	u.CA.Close()
	u.CA = open(t, u.cfg)
	u.clock = u.clock.Add(u.CA.cfg.JWTTTL + time.Minute)
	u.step(t, Prepared) // what was withdrawn is gone, and asking gives the new root again
	u.confirm()
	u.step(t, Activated)
	u.confirm()
	u.clock = u.clock.Add(2 * time.Hour)
	u.step(t, Tainted)
	if b := u.Bundle(); len(b.Tainted) != 1 || !b.Tainted[0].Equal(first) {
		t.Errorf("tainted: %v", b.Tainted)
	}
	u.confirm()
	u.clock = u.clock.Add(2 * time.Hour)
	u.step(t, Steady)
	if b := u.Bundle(); len(b.X509) != 1 || b.X509[0].Equal(first) {
		t.Errorf("the old root is trusted still: %d roots", len(b.X509))
	}
	u.leaf(t)
	u.up.renewRoot(t, "third")
	if r, err := u.Emergency(t.Context()); err != nil || r.Phase != Tainted {
		t.Errorf("%+v, %v", r, err)
	}
	u.leaf(t)
}

func TestTheUpstreamAuthorityIsDown(t *testing.T) {
	u := newUnder(t)
	var told []error
	u.CA.cfg.OnUpstream = func(err error) { told = append(told, err) }
	u.up.fail = errors.New("no route")
	u.clock = u.clock.Add(u.CA.cfg.IntermediateTTL * 5 / 6).Add(time.Minute)
	before := u.up.asked
	if err := u.renew(t.Context()); err == nil || !strings.Contains(err.Error(), "no route") {
		t.Errorf("renew: %v", err)
	}
	if err := u.renew(t.Context()); err != nil || u.up.asked != before+1 {
		t.Errorf("asked %d times without a pause: %v", u.up.asked-before, err)
	}
	u.leaf(t)
	if _, err := u.Rotate(t.Context(), ByHand, true); err == nil || u.Rotation().Phase != Steady {
		t.Errorf("rotate: %v", err)
	}
	u.CA.Close()
	u.CA = open(t, u.cfg) // not for want of an answer
	u.leaf(t)
	u.clock = u.clock.Add(u.CA.cfg.IntermediateTTL)
	if _, err := u.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()}); !errors.Is(err, ErrExpired) {
		t.Errorf("sign under an expired intermediate: %v", err)
	}
	u.CA.Close()
	u.CA = open(t, u.cfg)
	u.up.fail = nil
	u.clock = u.clock.Add(2 * askMost)
	u.step(t, Steady)
	u.leaf(t)
	if len(told) == 0 || told[0] == nil {
		t.Errorf("told %v", told)
	}
	if found, _ := filepath.Glob(filepath.Join(u.cfg.Dir, "intermediate*")); len(found) != 3 {
		t.Errorf("failures left files: %v", found)
	}
}

func TestWhatAnUpstreamAuthorityMayNotSend(t *testing.T) {
	other, err := url.Parse("spiffe://other.example")
	if err != nil {
		t.Fatal(err)
	}
	edit := func(f func(*x509.Certificate)) func(*above) { return func(a *above) { a.edit = f } }
	for _, tt := range []struct {
		name, want string
		do         func(*above)
	}{
		{"another trust domain", "its URI SAN is not", edit(func(c *x509.Certificate) { c.URIs = []*url.URL{other} })},
		{"a second URI", "its URI SAN is not", edit(func(c *x509.Certificate) { c.URIs = append(c.URIs[:1:1], other) })},
		{"no URI", "its URI SAN is not", edit(func(c *x509.Certificate) { c.URIs = nil })},
		{"a DNS name", "it has DNS names", edit(func(c *x509.Certificate) { c.DNSNames = []string{"x.example"} })},
		{"another key", "not the one in the CSR", edit(func(c *x509.Certificate) { c.PublicKey = anyKey.Public() })},
		{"no CA", "it does not say cA", edit(func(c *x509.Certificate) { c.IsCA, c.MaxPathLen, c.SubjectKeyId = false, 0, []byte{1} })},
		{"no path length", "its path length", edit(func(c *x509.Certificate) { c.MaxPathLen = -1 })},
		{"the usage of a leaf", "its key usage", edit(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature })},
		{"an extended usage", "extended key usage", edit(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })},
		{"no time left", "it ends at", edit(func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(90 * time.Second) })},
		{"a time to come", "it begins at", edit(func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(time.Hour) })},
		{"too long a life", "after its issuer", edit(func(c *x509.Certificate) { c.NotAfter = c.NotAfter.AddDate(2, 0, 0) })},
		{"constraints that forbid us", "would not verify", edit(func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"other.example"}, true
		})},
		{"an unknown extension", "which we never set", edit(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Value: []byte{5, 0}}}
		})},
		{"a serial number that can be guessed", "serial number", edit(func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1) })},
		{"no chain", "without a chain", func(a *above) { a.sends = func([]*x509.Certificate) []*x509.Certificate { return nil } }},
		{"a hole in the chain", "not signed by the next", func(a *above) { a.sends = func(c []*x509.Certificate) []*x509.Certificate { return c[1:] } }},
		{"no root", `root "CN=first mid"`, func(a *above) { a.sends = func(c []*x509.Certificate) []*x509.Certificate { return c[:1] } }},
		{"too long a chain", "at most 3", func(a *above) {
			a.sends = func(c []*x509.Certificate) []*x509.Certificate {
				return []*x509.Certificate{c[0], c[0], c[0], c[0], c[1]}
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u := &under{cfg: config(t)}
			u.up = newAbove(t, time.Now)
			tt.do(u.up)
			u.cfg.Upstream = u.up
			_, err := Open(t.Context(), u.cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if found, _ := filepath.Glob(filepath.Join(u.cfg.Dir, "*")); len(found) > 0 {
				t.Errorf("a refusal left %v", found)
			}
		})
	}
}

func TestTheUpstreamAuthorityEndsSoon(t *testing.T) {
	u := newUnder(t)
	u.clock = u.up.chain[1].NotAfter.Add(-24 * time.Hour)
	u.step(t, Steady)
	if got := u.Status().IntermediateExpires; got.After(u.up.chain[1].NotAfter) || got.Before(u.clock.Add(23*time.Hour)) {
		t.Errorf("it ends at %v, the root at %v", got, u.up.chain[1].NotAfter)
	}
	u.leaf(t)
}

func TestAQuestionEndsWithItsContext(t *testing.T) {
	u := newUnder(t)
	u.up.mu.Lock()
	defer u.up.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := u.Rotate(ctx, ByHand, false); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestARootOfOursIsNotAnUpstreamOne(t *testing.T) {
	cfg := config(t)
	open(t, cfg).Close()
	cfg.Upstream = newAbove(t, time.Now)
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "ca.upstream asks for one") {
		t.Errorf("got %v", err)
	}
	u := newUnder(t)
	u.CA.Close()
	u.cfg.Upstream = nil
	if _, err := Open(t.Context(), u.cfg); err == nil || !strings.Contains(err.Error(), "of an upstream authority") {
		t.Errorf("got %v", err)
	}
}

func TestStepsByNameUnderAnUpstreamAuthority(t *testing.T) {
	u := newUnder(t)
	first := u.current.Load().root
	ready := func() string {
		t.Helper()
		for _, x := range u.Rotation().Intermediates {
			if x.Next {
				return x.ID
			}
		}
		t.Fatal("no intermediate is next")
		return ""
	}
	prepare := func() {
		t.Helper()
		if _, err := u.MoveRoot(t.Context(), StepPrepare, ""); err != nil {
			t.Fatal(err)
		}
		u.confirm()
	}
	prepare()
	if _, err := u.MoveRoot(t.Context(), StepActivate, "00"); !errors.Is(err, ErrUnknown) {
		t.Errorf("activate another: %v", err)
	}
	id := ready()
	if r, err := u.MoveRoot(t.Context(), StepActivate, id); err != nil || r.Phase != Steady || len(r.Intermediates) != 1 || r.Intermediates[0].ID != id {
		t.Errorf("%+v, %v", r, err)
	}
	u.up.renewRoot(t, "second")
	prepare()
	if r, err := u.MoveRoot(t.Context(), StepActivate, ready()); err != nil || r.Phase != Activated || len(r.Intermediates) != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	u.confirm()
	for _, step := range []Step{StepTaint, StepRevoke} {
		if _, err := u.MoveRoot(t.Context(), step, RootID(first)); err != nil {
			t.Fatalf("%s: %v", step, err)
		}
		u.confirm()
		u.clock = u.clock.Add(u.CA.cfg.JWTTTL)
	}
	if b := u.Bundle(); len(b.X509) != 1 || b.X509[0].Equal(first) || len(b.Tainted) > 0 {
		t.Errorf("the old root is trusted still: %d roots", len(b.X509))
	}
	u.leaf(t)
	prepare()
	if _, err := u.Rollback(t.Context()); err != nil || len(u.Rotation().Intermediates) != 1 {
		t.Errorf("%+v, %v", u.Rotation(), err)
	}
	if found, _ := filepath.Glob(filepath.Join(u.cfg.Dir, "intermediate*")); len(found) != 3 {
		t.Errorf("what was rolled back left files: %v", found)
	}
}

// The state may reach the disk although the write says that it failed. What it
// names must be there at the next start.
func TestAnOfferStaysThatTheDiskNames(t *testing.T) {
	u := newUnder(t)
	was := u.CA.write
	u.CA.write = func(path string, data []byte, perm fs.FileMode) error {
		if err := was(path, data, perm); err != nil {
			return err
		}
		if filepath.Base(path) == stateFile {
			return errors.New("the directory was not synced")
		}
		return nil
	}
	u.clock = u.clock.Add(u.CA.cfg.IntermediateTTL * 5 / 6).Add(time.Minute)
	if err := u.renew(t.Context()); err == nil {
		t.Error("the failure is not told")
	}
	u.CA.Close()
	u.CA = open(t, u.cfg)
	u.leaf(t)
}

func TestNothingIsAskedWithoutARecord(t *testing.T) {
	u := newUnder(t)
	asked := u.up.asked
	u.cfg.Audit.(*records).fail = func(audit.Record) error { return errors.New("disk full") }
	if _, err := u.Rotate(t.Context(), ByHand, false); err == nil || u.up.asked != asked {
		t.Errorf("asked %d times, %v", u.up.asked-asked, err)
	}
}
