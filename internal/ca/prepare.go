package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
)

const (
	// draftLife is how long a Draft may wait: its dates were fixed by Prepare.
	draftLife = 30 * time.Second
	// maxDNSNames keeps a certificate within one flight of a handshake.
	maxDNSNames = 32
	maxIDLen    = 2048
)

// An X509Request asks for an X.509-SVID. Whether the caller may have it was
// decided by attestation: the CA takes the key from a CSR and nothing else.
type X509Request struct {
	// ID is in the trust domain of the CA, with a path that is not under
	// /spire, which is the infrastructure's own.
	ID spiffeid.ID
	// PublicKey is EC P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits.
	PublicKey crypto.PublicKey
	// TTL is the life from now; 0 means Config.X509TTL. A leaf never outlives
	// the intermediate.
	TTL time.Duration
	// DNSNames are added as SANs, for clients that know no SPIFFE ID.
	DNSNames []string
}

// A Draft proves that what is to be signed passed the linter. Only a CA makes
// one, only that CA redeems it, and only once. The zero Draft refuses.
type Draft struct{ d *draft }

type draft struct {
	ca       *CA
	with     *signing
	template *x509.Certificate
	want     want
	// linted is what the linter saw, the part of a certificate that is signed,
	// and cert what was read from it.
	linted []byte
	cert   *x509.Certificate
	made   time.Time
	// kind is for the audit: "x509" or "x509 downstream CA".
	kind  string
	spent atomic.Bool
}

// Prepare checks the request, builds the certificate and lints it before any key
// has signed it: a fault shows before the real key is touched. The error is
// ErrRefused when the request is at fault.
func (c *CA) Prepare(req X509Request) (Draft, error) {
	if reserved(req.ID) {
		return Draft{}, fmt.Errorf("%w: %s is under /spire, which is not for workloads", ErrRefused, req.ID)
	}
	return c.prepare(req)
}

// DraftAgent is Prepare for the node identity of a proxy,
// spiffe://TD/spire/agent/<attestor>/<name>.
func (c *CA) DraftAgent(id spiffeid.ID, key crypto.PublicKey, ttl time.Duration) (Draft, error) {
	rest, ok := strings.CutPrefix(id.Path(), "/spire/agent/")
	if attestor, name, _ := strings.Cut(rest, "/"); !ok || attestor == "" || name == "" {
		return Draft{}, fmt.Errorf("%w: %s is not an agent, want /spire/agent/<attestor>/<name>", ErrRefused, id)
	}
	return c.prepare(X509Request{ID: id, PublicKey: key, TTL: ttl})
}

// DraftServer is Prepare for the issuer itself, spiffe://TD/spire/server. The
// DNS names are those under which proxies reach it, if any.
func (c *CA) DraftServer(key crypto.PublicKey, ttl time.Duration, dns ...string) (Draft, error) {
	id, err := spiffeid.FromPath(c.cfg.TrustDomain, "/spire/server")
	if err != nil {
		return Draft{}, fmt.Errorf("name server: %w", err)
	}
	now := c.cfg.Now()
	s, err := c.active(now)
	if err != nil {
		return Draft{}, err
	}
	return c.draft(X509Request{ID: id, PublicKey: key, TTL: ttl, DNSNames: dns}, c.serverSigning(s, now), now)
}

// serverSigning is what signs for the issuer itself: a proxy that does not
// trust the new root yet must be able to fetch it.
func (c *CA) serverSigning(s *signing, now time.Time) *signing {
	if f := s.former; f != nil && c.lagging.Load() && now.Before(f.intermediate.NotAfter) {
		return f
	}
	return s
}

// serverRoot is the root above the issuer's own certificate.
func (c *CA) serverRoot(now time.Time) *x509.Certificate {
	if s := c.current.Load(); s != nil {
		return c.serverSigning(s, now).root
	}
	return nil
}

func reserved(id spiffeid.ID) bool {
	return id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/")
}

func (c *CA) prepare(req X509Request) (Draft, error) {
	now := c.cfg.Now()
	s, err := c.active(now)
	if err != nil {
		return Draft{}, err
	}
	return c.draft(req, s, now)
}

func (c *CA) draft(req X509Request, s *signing, now time.Time) (Draft, error) {
	der, err := encodeKey(req.PublicKey)
	if err == nil {
		err = c.check(req, s, der)
	}
	if err != nil {
		return Draft{}, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	ttl := req.TTL
	if ttl == 0 {
		ttl = c.cfg.X509TTL
	}
	end := now.Add(ttl)
	if end.After(s.intermediate.NotAfter) {
		end = s.intermediate.NotAfter
	}
	serial, err := newSerial()
	if err != nil {
		return Draft{}, err
	}
	ski := sha256.Sum256(der)
	d := &draft{ca: c, with: s, made: now, kind: "x509", want: want{id: req.ID, key: der, dns: slices.Clone(req.DNSNames), issuer: s.intermediate}}
	d.template = &x509.Certificate{
		SerialNumber:          serial,
		URIs:                  []*url.URL{req.ID.URL()},
		DNSNames:              slices.Clone(req.DNSNames),
		NotBefore:             now.Add(-backdate),
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          ski[:20],
		SignatureAlgorithm:    x509.ECDSAWithSHA256,
	}
	if d.linted, d.cert, err = lintDraft(d); err != nil {
		return Draft{}, fmt.Errorf("%w: the certificate would not conform: %w", ErrRefused, err)
	}
	// A key of our own: the caller keeps a pointer to the one it gave.
	d.template.PublicKey = d.cert.PublicKey
	return Draft{d}, nil
}

// check refuses a request before anything is built. Der is its key.
func (c *CA) check(req X509Request, s *signing, der []byte) error {
	switch {
	case req.ID.IsZero():
		return errors.New("no SPIFFE ID is given")
	case !req.ID.MemberOf(c.cfg.TrustDomain):
		return fmt.Errorf("%s is not in trust domain %s", req.ID, c.cfg.TrustDomain)
	case req.ID.Path() == "":
		return fmt.Errorf("%s has no path", req.ID)
	case len(req.ID.String()) > maxIDLen:
		return fmt.Errorf("the SPIFFE ID has %d bytes, want at most %d", len(req.ID.String()), maxIDLen)
	case s.own[string(der)]:
		return errors.New("the public key is one of the CA")
	case req.TTL != 0 && req.TTL < c.cfg.floor():
		return fmt.Errorf("a life of %v is below the floor of %v", req.TTL, c.cfg.floor())
	case len(req.DNSNames) > maxDNSNames:
		return fmt.Errorf("%d DNS names are more than %d", len(req.DNSNames), maxDNSNames)
	}
	for i, name := range req.DNSNames {
		if err := checkDNS(name); err != nil {
			return err
		}
		if slices.Contains(req.DNSNames[:i], name) {
			return fmt.Errorf("DNS name %q is given twice", name)
		}
	}
	return nil
}

// encodeKey returns the bytes of a key, which the caller cannot change between
// lint and signature as it could the key.
func encodeKey(key crypto.PublicKey) ([]byte, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	return der, nil
}

// lintDraft lints the bytes that are to be signed, as a certificate without a
// signature: no key signs anything that the linter has not seen.
func lintDraft(d *draft) ([]byte, *x509.Certificate, error) {
	tbs, err := d.encode()
	if err != nil {
		return nil, nil, err
	}
	cert, err := unsigned(tbs)
	if err != nil {
		return nil, nil, err
	}
	return tbs, cert, lintLeaf(cert, d.want)
}

// unsigned reads what is to be signed.
func unsigned(tbs []byte) (*x509.Certificate, error) {
	raw, err := assemble(tbs, noSignature)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(cert.RawTBSCertificate, tbs) {
		return nil, errors.New("it is read as something else than it was written")
	}
	return cert, nil
}

// redeem takes the proof out of a Draft, once.
func (c *CA) redeem(p Draft) (*draft, error) {
	switch {
	case p.d == nil:
		return nil, fmt.Errorf("%w: it is the zero value", ErrDraft)
	case p.d.ca != c:
		return nil, fmt.Errorf("%w: another CA made it", ErrDraft)
	case !p.d.spent.CompareAndSwap(false, true):
		return nil, fmt.Errorf("%w: it was redeemed before", ErrDraft)
	}
	now := c.cfg.Now()
	if age := now.Sub(p.d.made); age > draftLife || age < -backdate || !p.d.template.NotAfter.After(now) {
		return nil, fmt.Errorf("%w: it was made %v ago", ErrDraft, age)
	}
	return p.d, nil
}

// Sign redeems a Draft: it records the intent, signs, looks at what came back
// and records the result. It returns the leaf, the intermediate and what stands
// between that and the root. Without a record of both, no certificate leaves.
func (c *CA) Sign(ctx context.Context, p Draft) ([]*x509.Certificate, error) {
	d, err := c.redeem(p)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if c.current.Load() == nil {
		return nil, errors.New("sign: CA is closed")
	}
	detail := fmt.Sprintf("%s serial %x until %s", d.kind, d.template.SerialNumber, utc(d.template.NotAfter))
	if err := c.record(d.want.id, "intent", "", detail); err != nil {
		return nil, fmt.Errorf("sign: record intent: %w", err)
	}
	chain, err := d.sign()
	if err != nil {
		err = fmt.Errorf("sign: %w", err)
		return nil, errors.Join(err, c.record(d.want.id, "failed", audit.Deny, detail))
	}
	if err := c.record(d.want.id, "done", audit.Allow, detail); err != nil {
		return nil, fmt.Errorf("sign: record result: %w", err)
	}
	return chain, nil
}

// sign lets the service sign. One that hands out its key, as the built-in one
// does, signs the linted bytes as they are: that saves a second encoding.
func (d *draft) sign() ([]*x509.Certificate, error) {
	cert, err := d.signLinted()
	if cert == nil && err == nil {
		cert, err = d.signTemplate()
	}
	if err != nil {
		return nil, err
	}
	// What comes back must be, to the byte, what the linter saw, and signed by
	// the intermediate: nothing of a service is trusted. A wrong signature could
	// give away the key that made it, so none leaves.
	if !bytes.Equal(cert.RawTBSCertificate, d.linted) {
		return nil, errors.New("the signed certificate is not the one drafted")
	}
	if err := d.with.intermediate.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		return nil, fmt.Errorf("the signature is not that of the intermediate: %w", err)
	}
	return append([]*x509.Certificate{cert, d.with.intermediate}, d.with.above...), nil
}

func (d *draft) signTemplate() (*x509.Certificate, error) {
	resp, err := d.with.service.CreateCertificate(&apiv1.CreateCertificateRequest{
		Template: d.template, Lifetime: d.template.NotAfter.Sub(d.made), Backdate: backdate,
	})
	if err != nil {
		return nil, err
	}
	return resp.Certificate, nil
}

// signLinted returns nil when the service keeps its key to itself or has one
// that is not EC.
func (d *draft) signLinted() (*x509.Certificate, error) {
	holder, ok := d.with.service.(apiv1.CertificateAuthoritySigner)
	if !ok {
		return nil, nil
	}
	signer, err := holder.GetSigner()
	if err != nil {
		return nil, err
	}
	if _, ok := signer.Public().(*ecdsa.PublicKey); !ok {
		return nil, nil
	}
	digest := sha256.Sum256(d.linted)
	signature, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	return d.signed(signature)
}

// signed is the linted certificate with a signature. What was read from the
// linted bytes holds for it and is not read again; that it holds these bytes,
// and the signature, nothing before and nothing after, is.
func (d *draft) signed(signature []byte) (*x509.Certificate, error) {
	raw, err := assemble(d.linted, signature)
	if err != nil {
		return nil, err
	}
	tbs, sig, err := parts(raw)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(tbs, d.cert.RawTBSCertificate) || !bytes.Equal(sig, signature) {
		return nil, errors.New("the signed certificate is read as something else than it was written")
	}
	cert := *d.cert
	cert.Raw, cert.RawTBSCertificate, cert.Signature = raw, tbs, sig
	return &cert, nil
}

func (c *CA) record(id spiffeid.ID, reason, decision, detail string) error {
	return c.cfg.Audit.Append(&audit.Record{Time: c.cfg.Now(), Kind: audit.KindIssue, Dst: id.String(), Reason: reason, Decision: decision, Detail: detail})
}
