// Package ca is the only signer of the house: it holds the root and the
// intermediate of a trust domain and signs X.509-SVIDs and JWT-SVIDs.
//
// A certificate takes three steps: Prepare lints what would be signed, the
// Draft proves it, Sign records the intent and redeems the Draft once. Whom to
// sign for is decided elsewhere. Run renews the intermediate, moves a rotation
// of the root on, and owns no goroutine but that which waits for an upstream
// authority; signing takes no lock.
package ca

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

var (
	// ErrRefused is returned for a request that must not be signed.
	ErrRefused = errors.New("refused to sign")
	// ErrDraft is returned for a Draft that this CA did not make, or made and
	// signed before, or made too long ago.
	ErrDraft = errors.New("draft is not good for a signature")
	// ErrRootExpired is returned by Open; Replace makes another root.
	ErrRootExpired = errors.New("the root certificate expired")
	// ErrExpired is returned while no intermediate is valid.
	ErrExpired = errors.New("no intermediate certificate is valid now")
)

const (
	// backdate makes up for clocks that are behind.
	backdate = 10 * time.Second
	// productionFloor is the shortest life without AllowShort: below it a proxy
	// that misses one renewal is cut off.
	productionFloor = time.Minute
	shortFloor      = time.Second
)

// A Recorder keeps audit records. Append returns once the record is written;
// an error means that nothing may be signed. Safe for concurrent use.
type Recorder interface {
	Append(*audit.Record) error
}

// Config says what a CA signs for and where its keys are.
type Config struct {
	// TrustDomain is the one trust domain of the CA. Required.
	TrustDomain spiffeid.TrustDomain
	// Dir holds certificates and state, mode 0700. Required.
	Dir string
	// RootDir has root.crt and root.key of the first issuer of the trust domain,
	// for another one that signs under the same root with an intermediate of
	// its own. It is read once, when Dir is empty. Mode 0700. Default: the root
	// is made.
	RootDir string
	// KMS says where the private keys are: empty for files in Dir,
	// "softkms:path=/dir", a file: URI or an absolute path for files in another
	// directory, or a pkcs11: URI for a token that they never leave.
	KMS string
	// Passphrase encrypts the private keys at rest. Without it they are plain
	// PKCS#8 of mode 0600.
	Passphrase []byte
	// RootTTL is the life of a new root. Default 1 year.
	RootTTL time.Duration
	// IntermediateTTL is the life of an intermediate, renewed at 5/6. Default
	// 7 days.
	IntermediateTTL time.Duration
	// X509TTL is the life of an X.509-SVID when the request names none. At most
	// a sixth of IntermediateTTL, so that no leaf is cut short. Default 1 h.
	X509TTL time.Duration
	// JWTTTL is the life of a JWT-SVID when the request names none. Default 5
	// min.
	JWTTTL time.Duration
	// JWTIssuer is the claim iss of JWT-SVIDs, the URL where OIDC verifiers
	// discover the keys. Without it there is no such claim.
	JWTIssuer string
	// AllowShort lowers the floor of every life from 1 min to 1 s, for tests
	// and the demo.
	AllowShort bool
	// SharedRoot says that other issuers sign under the same root. Each would
	// make another one, so then the root is replaced by force alone, while the
	// others are stopped; unless the CA has joined them.
	SharedRoot bool
	// Upstream signs the intermediate in place of a root of our own. The chain it
	// answers with ends in its root: that this is the root meant, and that a call
	// ends in due time, is for it to see to. Default: a root of our own.
	Upstream apiv1.CertificateAuthorityService
	// OnUpstream is told how each call of Upstream ended: nil for well. It must
	// not call the CA.
	OnUpstream func(error)
	// Holders returns the live proxies and what they trust and show, and false
	// while that is not known. A rotation of the root waits for them; without
	// Holders it goes on only when forced.
	Holders func() ([]Holder, bool)
	// Audit receives an intent before and a result after each signature.
	// Required.
	Audit Recorder
	// Log receives renewals and their failures. Default: none.
	Log *slog.Logger
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

func (c Config) withDefaults() Config {
	c.RootTTL = cmp.Or(c.RootTTL, 365*24*time.Hour)
	c.IntermediateTTL = cmp.Or(c.IntermediateTTL, 7*24*time.Hour)
	c.X509TTL = cmp.Or(c.X509TTL, time.Hour)
	c.JWTTTL = cmp.Or(c.JWTTTL, 5*time.Minute)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Holders == nil {
		c.Holders = func() ([]Holder, bool) { return nil, false }
	}
	return c
}

func (c Config) floor() time.Duration {
	if c.AllowShort {
		return shortFloor
	}
	return productionFloor
}

// Validate reports every mistake, each by the name of its field.
func (c Config) Validate() error {
	d := c.withDefaults()
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if d.TrustDomain.IsZero() {
		bad("trust_domain: missing")
	}
	if d.Dir == "" {
		bad("ca.dir: missing")
	}
	if err := d.CheckKMS(); err != nil {
		bad("ca.kms: %w", err)
	}
	if d.Audit == nil {
		bad("ca.audit: missing")
	}
	if d.Upstream != nil && (d.RootDir != "" || d.SharedRoot) {
		bad("ca.upstream: an issuer has an authority above it or shares a root with others, not both")
	}
	for _, x := range []struct {
		name string
		ttl  time.Duration
	}{{"ca.root_ttl", d.RootTTL}, {"ca.intermediate_ttl", d.IntermediateTTL}, {"ca.x509_ttl", d.X509TTL}, {"ca.jwt_ttl", d.JWTTTL}} {
		if x.ttl < d.floor() {
			bad("%s: %v is below the floor of %v", x.name, x.ttl, d.floor())
		}
	}
	if d.X509TTL > d.IntermediateTTL/6 {
		bad("ca.x509_ttl: %v is more than a sixth of ca.intermediate_ttl, %v", d.X509TTL, d.IntermediateTTL)
	}
	if d.JWTTTL > d.IntermediateTTL/6 {
		bad("ca.jwt_ttl: %v is more than a sixth of ca.intermediate_ttl, %v", d.JWTTTL, d.IntermediateTTL)
	}
	if d.IntermediateTTL > d.RootTTL/2 {
		bad("ca.intermediate_ttl: %v is more than half of ca.root_ttl, %v", d.IntermediateTTL, d.RootTTL)
	}
	return errors.Join(errs...)
}

// A JWTKey is a public key that verifies JWT-SVIDs.
type JWTKey struct {
	KeyID     string
	PublicKey crypto.PublicKey
	// ExpiresAt is when the key leaves the bundle.
	ExpiresAt time.Time
	// Tainted says that tokens by this key should be fetched anew.
	Tainted bool
}

// A Bundle is what others need to verify what this CA signed.
type Bundle struct {
	// X509 holds the roots, the signing one first; during a rotation there is
	// more than one. Intermediates travel in the chain.
	X509 []*x509.Certificate
	// Tainted are those of X509 under which SVIDs should be fetched anew. They
	// are trusted still.
	Tainted []*x509.Certificate
	// JWT holds the keys in use, the next one before its first use, and those
	// retired while a token may still be valid.
	JWT []JWTKey
	// RefreshHint is how often to look for a new bundle.
	RefreshHint time.Duration
	// Sequence grows with each change of the content.
	Sequence uint64
}

// Status is when the parts of the CA expire, for metrics and people.
type Status struct {
	RootExpires         time.Time
	IntermediateExpires time.Time
	// IntermediateSerial is decimal.
	IntermediateSerial string
	// KeyID is the kid of the JWT key in use.
	KeyID string
}

// signing is all that a signature needs: immutable, replaced as a whole.
type signing struct {
	// service signs with the intermediate; a service of another CAS fits here.
	service      apiv1.CertificateAuthorityService
	intermediate *x509.Certificate
	// above stand between intermediate and root: none when root is ours.
	above  []*x509.Certificate
	root   *x509.Certificate
	jwt    jwtKey
	bundle Bundle
	// others are the roots that do not sign, as in rotation.Others.
	others []*x509.Certificate
	// former signs for the issuer's own connection while a proxy may not trust
	// root yet; nil outside of such a time.
	former *signing
	// own are the DER public keys of the CA itself: nobody else may have them.
	own map[string]bool
}

// CA signs for one trust domain. Its methods are safe for concurrent use.
type CA struct {
	cfg     Config
	dir     *os.File // locked while the CA is open
	keys    keyStore
	current atomic.Pointer[signing]

	// lagging says that a proxy may not trust the root that signs.
	lagging atomic.Bool

	// write is how certificates and state reach the disk; tests kill it.
	write func(path string, data []byte, perm fs.FileMode) error

	// moving orders what is agreed with other issuers, and questions to the
	// upstream authority. It comes before mu.
	moving sync.Mutex

	// mu guards renewal: state, changed and the files in Dir; and who the others
	// are that share the root, nil for none.
	mu      sync.Mutex
	state   state
	changed chan struct{}
	company *company
	council council
	up      asking
}

// Open loads the CA in cfg.Dir, or makes a root and an intermediate when the
// directory is empty. An intermediate that is due, or expired while the CA was
// down, is renewed at once. Each way in which the directory can be wrong is
// one error that names the next step.
func Open(ctx context.Context, cfg Config) (*CA, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	return openWith(ctx, cfg, daemon.WriteFile)
}

func openWith(ctx context.Context, cfg Config, write func(string, []byte, fs.FileMode) error) (*CA, error) {
	cfg = cfg.withDefaults()
	c := &CA{cfg: cfg, changed: make(chan struct{}), write: write}
	err := c.openDir(ctx)
	if err == nil {
		err = c.open(ctx)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("open CA in %s: %w", cfg.Dir, err)
	}
	return c, nil
}

// openDir locks the directory and finds the keys.
func (c *CA) openDir(ctx context.Context) error {
	var err error
	if c.dir, err = lockDir(c.cfg.Dir); err != nil {
		return err
	}
	c.keys, err = c.openKeys(ctx)
	if err != nil {
		return fmt.Errorf("open ca.kms: %w", err)
	}
	return nil
}

func (c *CA) open(ctx context.Context) error {
	fresh, err := c.loadState()
	if err != nil {
		return err
	}
	if fresh {
		create := c.create
		if c.cfg.Upstream != nil {
			create = c.createUpstream
		}
		if err := create(ctx); err != nil {
			return err
		}
	}
	s, err := c.load(ctx)
	if err != nil {
		return err
	}
	c.current.Store(s)
	c.sweep()
	err = c.renew(ctx)
	if err != nil && c.cfg.Upstream != nil {
		// Run tries again; what there is may be good for days.
		c.cfg.Log.Error("CA renewal failed", "err", err, "intermediate_expires", s.intermediate.NotAfter)
		return nil
	}
	return err
}

// Close releases the directory for another process. Nothing may be signed
// afterwards.
func (c *CA) Close() error {
	c.current.Store(nil)
	var errs []error
	if c.keys != nil {
		errs = append(errs, c.keys.close())
	}
	if c.dir != nil {
		errs = append(errs, c.dir.Close())
	}
	return errors.Join(errs...)
}

// TrustDomain returns the trust domain that the CA signs for.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.cfg.TrustDomain }

// Bundle returns what verifies the signatures of this CA. The caller must not
// change it.
func (c *CA) Bundle() Bundle {
	if s := c.current.Load(); s != nil {
		return s.bundle
	}
	return Bundle{}
}

// Changed returns a channel that is closed at the next change of the bundle or
// of the intermediate.
func (c *CA) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// Status returns when the parts of the CA expire.
func (c *CA) Status() Status {
	s := c.current.Load()
	if s == nil {
		return Status{}
	}
	return Status{
		RootExpires:         s.root.NotAfter,
		IntermediateExpires: s.intermediate.NotAfter,
		IntermediateSerial:  s.intermediate.SerialNumber.String(),
		KeyID:               s.jwt.id,
	}
}

// active returns what signs now, or ErrExpired.
func (c *CA) active(now time.Time) (*signing, error) {
	s := c.current.Load()
	switch {
	case s == nil:
		return nil, errors.New("CA is closed")
	case now.After(s.intermediate.NotAfter):
		return nil, fmt.Errorf("%w: the one we have expired at %s", ErrExpired, utc(s.intermediate.NotAfter))
	case now.Before(s.intermediate.NotBefore):
		return nil, fmt.Errorf("%w: the clock says %s, ours begins at %s", ErrExpired, utc(now), utc(s.intermediate.NotBefore))
	}
	return s, nil
}

func utc(t time.Time) string { return t.UTC().Format(time.RFC3339) }
