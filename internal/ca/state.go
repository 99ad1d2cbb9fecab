package ca

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/daemon"
)

const (
	stateFile = "state.json"
	rootName  = "root"
)

// state says which files in the directory count. It is written last, so that
// a crash in between leaves the CA as it was.
type state struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
	// Upstream says that the roots are those of an upstream authority, which has
	// their keys.
	Upstream bool `json:"upstream,omitempty"`
	// Root is that which signs; empty is the first one, "root".
	Root         string         `json:"root,omitempty"`
	Intermediate string         `json:"intermediate"`
	Sequence     uint64         `json:"sequence"`
	JWT          []jwtKeyRecord `json:"jwt_keys"`
	// Number is that of the plan which issuers that share the root follow; 0 of
	// one that has joined none.
	Number uint64 `json:"number,omitempty"`
	// Rotation is nil while none is under way.
	Rotation *rotation `json:"rotation,omitempty"`
}

func (s state) root() string { return cmp.Or(s.Root, rootName) }

// certificates are the names of all roots and intermediates.
func (s state) certificates() []string {
	names := []string{s.root(), s.Intermediate}
	if r := s.Rotation; r != nil {
		names = append(names, r.Others...)
		for _, name := range []string{r.Intermediate, r.Ready} {
			if name != "" {
				names = append(names, name)
			}
		}
	}
	return names
}

// A jwtKeyRecord is one JWT key: next before its first use, then active, then
// retired until it expires. The file carries its kid.
type jwtKeyRecord struct {
	KeyID   string    `json:"kid"`
	Role    jwtRole   `json:"role"`
	Expires time.Time `json:"expires"`
	// Tainted is set on a retired key that a rotation of the root replaced.
	Tainted bool `json:"tainted,omitempty"`
}

type jwtRole string

const (
	roleNext    jwtRole = "next"
	roleActive  jwtRole = "active"
	roleRetired jwtRole = "retired"
)

type jwtKey struct {
	id      string
	signer  crypto.Signer
	expires time.Time
}

// fileName is what a name in the state may be: it becomes part of a path.
var fileName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

func (c *CA) file(name string) string { return filepath.Join(c.cfg.Dir, name) }

// loadState reads the state, or says that the directory is fresh.
func (c *CA) loadState() (fresh bool, err error) {
	data, err := os.ReadFile(c.file(stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return true, c.nothingThere()
	}
	if err != nil {
		return false, fmt.Errorf("read state: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c.state); err != nil {
		return false, daemon.Hint(fmt.Errorf("%s is damaged: %w", stateFile, err), "restore it from a backup")
	}
	if c.state.Version != 1 {
		return false, daemon.Hint(fmt.Errorf("%s has version %d, this program knows 1", stateFile, c.state.Version), "run the program that wrote it")
	}
	if td, err := spiffeid.TrustDomainFromString(c.state.TrustDomain); err != nil || td != c.cfg.TrustDomain {
		return false, daemon.Hint(fmt.Errorf("the CA there is of trust domain %q, not of %q", c.state.TrustDomain, c.cfg.TrustDomain.Name()),
			"set trust_domain to "+c.state.TrustDomain+", or name another directory")
	}
	if c.state.Upstream != (c.cfg.Upstream != nil) {
		whose := map[bool]string{false: "of its own", true: "of an upstream authority"}
		return false, daemon.Hint(fmt.Errorf("the CA there has a root %s, and ca.upstream asks for one %s", whose[c.state.Upstream], whose[!c.state.Upstream]),
			"set ca.upstream as before; or move the directory ca aside, start the issuer, and give every proxy the new bundle.pem")
	}
	names := c.state.certificates()
	for _, k := range c.state.JWT {
		names = append(names, k.KeyID)
	}
	for _, n := range names {
		if !fileName.MatchString(n) {
			return false, daemon.Hint(fmt.Errorf("%s is damaged: %q is not a name", stateFile, n), "restore it from a backup")
		}
	}
	if r := c.state.Rotation; r != nil && (forward[r.Phase] == "" || r.Phase == Steady || len(r.Others) == 0 && (!c.state.Upstream || r.Phase != Prepared)) {
		return false, daemon.Hint(fmt.Errorf("%s is damaged: no rotation is %q with %d other roots", stateFile, r.Phase, len(r.Others)), "restore it from a backup")
	}
	return false, nil
}

// nothingThere refuses to make a CA where there was one.
func (c *CA) nothingThere() error {
	found := ""
	if ok, err := c.keys.has(rootName); err != nil {
		return err
	} else if ok {
		found = c.keys.where(rootName)
	}
	if cert := c.file(rootName + ".crt"); found == "" {
		if _, err := os.Lstat(cert); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		found = cert
	}
	return daemon.Hint(fmt.Errorf("%s is there but %s is not", found, stateFile),
		"restore "+stateFile+" from a backup, or remove the former if this CA never signed anything")
}

func encodeState(s state) ([]byte, error) {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode state: %w", err)
	}
	return append(data, '\n'), nil
}

func (c *CA) saveCert(name string, cert *x509.Certificate) error {
	return c.write(c.file(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o644)
}

func (c *CA) loadCert(name string) (*x509.Certificate, error) {
	path := c.file(name + ".crt")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, daemon.Hint(fmt.Errorf("certificate %s is missing", path), "restore it from a backup")
	}
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, daemon.Hint(fmt.Errorf("certificate %s is damaged: want exactly one PEM certificate", path), "restore it from a backup")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, daemon.Hint(fmt.Errorf("certificate %s is damaged: %w", path, err), "restore it from a backup")
	}
	return cert, nil
}

// pair loads a certificate and its key and checks that they belong together
// and to the trust domain.
func (c *CA) pair(name string, pathLen int) (*x509.Certificate, crypto.Signer, error) {
	cert, err := c.loadCert(name)
	if err != nil {
		return nil, nil, err
	}
	whole := cert
	if c.cfg.Upstream != nil {
		whole = plain(cert)
	}
	if err := lintCA(whole, c.cfg.TrustDomain, pathLen); err != nil {
		return nil, nil, daemon.Hint(fmt.Errorf("certificate %s is not one of this CA: %w", c.file(name+".crt"), err),
			"restore it from a backup, or name another directory")
	}
	key, err := c.keys.load(name)
	if err != nil {
		return nil, nil, err
	}
	if !samePublicKey(cert.PublicKey, key.Public()) {
		return nil, nil, daemon.Hint(fmt.Errorf("%s does not belong to its certificate", c.keys.where(name)), "restore both from one backup")
	}
	return cert, key, nil
}

// load reads all that the state names and checks it against the clock.
func (c *CA) load(ctx context.Context) (*signing, error) {
	root, err := c.rootOf(c.state.root())
	if err != nil {
		return nil, err
	}
	now := c.cfg.Now()
	switch {
	case root.CheckSignatureFrom(root) != nil:
		return nil, daemon.Hint(errors.New("the root certificate is not signed by its own key"), "restore it from a backup")
	case now.After(root.NotAfter) && c.cfg.Upstream != nil:
		return nil, daemon.Hint(fmt.Errorf("%w at %s and the clock says %s", ErrRootExpired, utc(root.NotAfter), utc(now)),
			"check the clock; if it is right, move the directory ca aside, start the issuer, and give every proxy the new bundle.pem")
	case now.After(root.NotAfter):
		return nil, daemon.Hint(fmt.Errorf("%w at %s and the clock says %s", ErrRootExpired, utc(root.NotAfter), utc(now)),
			"check the clock; if it is right, stop the issuer and run: issuer ca rotate --emergency --config FILE")
	case now.Before(root.NotBefore):
		return nil, daemon.Hint(fmt.Errorf("the clock says %s, which is before the root certificate begins at %s", utc(now), utc(root.NotBefore)),
			"set the clock")
	}
	cert, _, err := c.pair(c.state.Intermediate, 0)
	if err != nil {
		return nil, err
	}
	if now.Before(cert.NotBefore) {
		return nil, daemon.Hint(fmt.Errorf("the clock says %s, which is before the intermediate certificate begins at %s", utc(now), utc(cert.NotBefore)),
			"set the clock; if it is right now and was ahead before, wait until then or restore a backup")
	}
	if r := c.state.Rotation; r != nil {
		for _, name := range r.Others {
			if _, err := c.rootOf(name); err != nil {
				return nil, err
			}
		}
	}
	return c.assemble(ctx, c.state)
}

// assemble makes the signing value for a state, reading what it names.
func (c *CA) assemble(ctx context.Context, st state) (*signing, error) {
	root, err := c.loadCert(st.root())
	if err != nil {
		return nil, err
	}
	s, err := c.signer(ctx, st.Intermediate, root)
	if err != nil {
		return nil, err
	}
	s.bundle = Bundle{X509: []*x509.Certificate{root}, Sequence: st.Sequence, RefreshHint: c.refreshHint()}
	if err := c.addOthers(ctx, s, st.Rotation); err != nil {
		return nil, err
	}
	for _, r := range st.JWT {
		signer, err := c.keys.load(r.KeyID)
		if err != nil {
			return nil, err
		}
		public, ok := signer.Public().(*ecdsa.PublicKey)
		if !ok || public.Curve != elliptic.P256() {
			return nil, daemon.Hint(fmt.Errorf("%s is not an EC P-256 key", c.keys.where(r.KeyID)), "restore it from a backup")
		}
		s.own[string(publicDER(public))] = true
		s.bundle.JWT = append(s.bundle.JWT, JWTKey{KeyID: r.KeyID, PublicKey: public, ExpiresAt: r.Expires, Tainted: r.Tainted})
		if r.Role == roleActive {
			s.jwt = jwtKey{r.KeyID, signer, r.Expires}
		}
	}
	if s.jwt.signer == nil {
		return nil, daemon.Hint(fmt.Errorf("%s names no active JWT key", stateFile), "restore it from a backup")
	}
	return s, nil
}

// signer opens an intermediate under a root.
func (c *CA) signer(ctx context.Context, name string, root *x509.Certificate) (*signing, error) {
	cert, key, err := c.pair(name, 0)
	if err != nil {
		return nil, err
	}
	above, err := c.loadAbove(name)
	if err != nil {
		return nil, err
	}
	last := cert
	for _, next := range append(slices.Clone(above), root) {
		if err := last.CheckSignatureFrom(next); err != nil {
			return nil, daemon.Hint(fmt.Errorf("the intermediate certificate is not signed by the root: %w", err), "restore both from one backup")
		}
		last = next
	}
	service, err := softcas.New(ctx, apiv1.Options{
		Type: apiv1.SoftCAS, CertificateChain: []*x509.Certificate{cert}, Signer: key,
	})
	if err != nil {
		return nil, fmt.Errorf("open signer: %w", err)
	}
	own := map[string]bool{string(publicDER(root.PublicKey)): true, string(publicDER(cert.PublicKey)): true}
	for _, x := range above {
		own[string(publicDER(x.PublicKey))] = true
	}
	return &signing{service: service, intermediate: cert, above: above, root: root, own: own}, nil
}

// addOthers puts the roots that do not sign into the bundle.
func (c *CA) addOthers(ctx context.Context, s *signing, r *rotation) error {
	if r == nil {
		return nil
	}
	for _, name := range r.Others {
		other, err := c.loadCert(name)
		if err != nil {
			return err
		}
		s.others = append(s.others, other)
		s.bundle.X509 = append(s.bundle.X509, other)
		s.own[string(publicDER(other.PublicKey))] = true
	}
	if r.Phase == Tainted || r.Phase == Withdrawn {
		s.bundle.Tainted = s.others
	}
	if r.Intermediate == "" {
		return nil
	}
	former, err := c.signer(ctx, r.Intermediate, s.others[len(s.others)-1])
	if err != nil {
		return err
	}
	for key := range former.own {
		s.own[key] = true
	}
	former.own = s.own
	s.former = former
	return nil
}

// refreshHint lets everybody see a new JWT key several times before its first
// use, a third of the intermediate's life after it is published.
func (c *CA) refreshHint() time.Duration {
	return max(time.Second, min(5*time.Minute, c.cfg.IntermediateTTL/30)).Truncate(time.Second)
}

// publicDER is the PKIX form of a key, nil for a type that has none.
func publicDER(key crypto.PublicKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil
	}
	return der
}

func samePublicKey(a, b crypto.PublicKey) bool {
	x := publicDER(a)
	return x != nil && bytes.Equal(x, publicDER(b))
}
