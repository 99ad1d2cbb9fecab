package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.step.sm/crypto/x509util"
)

const (
	// lookAtLeast bounds the sleep of Run, so that a jump of the wall clock is
	// seen.
	lookAtLeast = time.Minute
	retryAfter  = 5 * time.Second
	// gatePoll is how often a rotation under way asks what the proxies confirm.
	gatePoll = time.Second
)

// Run renews: at half of the intermediate's life it publishes the next JWT
// key, at 5/6 it makes a new intermediate and that key signs. A failed renewal
// is logged and tried again. It returns nil when ctx ends.
func (c *CA) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var changed <-chan struct{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-changed: // an operator may have begun a rotation
		}
		changed = c.Changed()
		wait := retryAfter
		if co := c.sharing(); co != nil {
			c.moving.Lock()
			err := c.meet(ctx, co)
			c.moving.Unlock()
			if err != nil && ctx.Err() == nil {
				c.cfg.Log.Error("the other issuers are not followed", "err", err)
			}
		}
		if err := c.renew(ctx); err != nil {
			c.cfg.Log.Error("CA renewal failed", "err", err, "intermediate_expires", c.Status().IntermediateExpires)
		} else {
			wait = max(10*time.Millisecond, c.nextStep().Sub(c.cfg.Now()))
		}
		timer.Reset(wait)
	}
}

// times returns when the next JWT key is published and when the intermediate
// is replaced.
func times(cert *x509.Certificate) (publish, activate time.Time) {
	begin := cert.NotBefore.Add(backdate)
	life := cert.NotAfter.Sub(begin)
	return begin.Add(life / 2), begin.Add(life / 6 * 5)
}

// nextStep is when renew has something to do again.
func (c *CA) nextStep() time.Time {
	now := c.cfg.Now()
	next := now.Add(lookAtLeast)
	s := c.current.Load()
	if s == nil {
		return next
	}
	publish, activate := times(s.intermediate)
	steps := []time.Time{publish, activate, c.askAgain()}
	for _, k := range s.bundle.JWT {
		steps = append(steps, k.ExpiresAt)
	}
	c.mu.Lock()
	steps = append(steps, c.schedule(s).next(c.state.Rotation)...)
	if c.state.Rotation != nil || c.company != nil {
		// Proxies and other issuers go on without telling the CA.
		next = now.Add(gatePoll)
	}
	c.mu.Unlock()
	for _, t := range steps {
		if t.After(now) && t.Before(next) {
			next = t
		}
	}
	return next
}

// renew does the steps that are due, if any.
func (c *CA) renew(ctx context.Context) error {
	if c.cfg.Upstream == nil {
		return c.renewHere(ctx)
	}
	c.moving.Lock()
	defer c.moving.Unlock()
	defer c.dropOffer()
	return errors.Join(c.askIfDue(ctx), c.renewHere(ctx))
}

func (c *CA) renewHere(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.current.Load()
	if s == nil {
		return errors.New("CA is closed")
	}
	now := c.cfg.Now()
	if err := c.rollOn(ctx, s, now); err != nil {
		return err
	}
	s = c.current.Load()
	publish, activate := times(s.intermediate)
	if c.state.Rotation.phase() == Prepared {
		// The next root starts together with the next JWT key.
		publish = now
	}
	// Nothing is gained by a new intermediate that ends with the root as this
	// one does, while this one is valid.
	last := !s.intermediate.NotAfter.Before(s.root.NotAfter)
	switch {
	case c.up.offered != nil:
		return c.takeOffer(ctx, s, now)
	case c.cfg.Upstream == nil && !now.Before(activate) && !last:
		return c.rotate(ctx, s, now)
	case !now.Before(publish) && !slices.ContainsFunc(c.state.JWT, isNext):
		return c.publishNext(ctx, now)
	case slices.ContainsFunc(c.state.JWT, func(r jwtKeyRecord) bool { return r.spent(now) }):
		return c.change(ctx, func(st *state) error { st.prune(now); return nil })
	}
	return nil
}

// spent says that no token by this key can be valid any more.
func (r jwtKeyRecord) spent(now time.Time) bool {
	return r.Role != roleActive && !r.Expires.After(now)
}

// prune takes spent JWT keys out of the bundle.
func (s *state) prune(now time.Time) {
	s.JWT = slices.DeleteFunc(s.JWT, func(r jwtKeyRecord) bool { return r.spent(now) })
}

func isNext(r jwtKeyRecord) bool { return r.Role == roleNext }

func isActive(r jwtKeyRecord) bool { return r.Role == roleActive }

// jwtLife covers a key from its publication through its use to the end of the
// last token it signed.
func (c *CA) jwtLife() time.Duration { return c.cfg.IntermediateTTL / 2 * 3 }

// newJWTKey makes and stores a key. The caller holds c.mu or is alone.
func (c *CA) newJWTKey(role jwtRole, now time.Time) (jwtKeyRecord, error) {
	var id [8]byte
	rand.Read(id[:])
	r := jwtKeyRecord{KeyID: "jwt-" + hex.EncodeToString(id[:]), Role: role, Expires: now.Add(c.jwtLife()).UTC().Truncate(time.Second)}
	if _, err := c.keys.create(r.KeyID); err != nil {
		return jwtKeyRecord{}, fmt.Errorf("make JWT key: %w", err)
	}
	return r, nil
}

// publishNext puts the next JWT key into the bundle before its first use, as
// the federation specification demands. The caller holds c.mu.
func (c *CA) publishNext(ctx context.Context, now time.Time) error {
	return c.change(ctx, func(st *state) error { return c.addNext(st, now) })
}

// addNext makes the next JWT key, if there is none.
func (c *CA) addNext(st *state, now time.Time) error {
	if slices.ContainsFunc(st.JWT, isNext) {
		return nil
	}
	r, err := c.newJWTKey(roleNext, now)
	if err != nil {
		return err
	}
	if st.Rotation.phase() == Prepared {
		// It may wait for a whole intermediate before it is used.
		r.Expires = r.Expires.Add(c.cfg.IntermediateTTL / 2)
	}
	st.JWT = append(st.JWT, r)
	return nil
}

// rotate makes a new intermediate and lets the next JWT key sign. The caller
// holds c.mu.
func (c *CA) rotate(ctx context.Context, s *signing, now time.Time) error {
	err := c.change(ctx, func(st *state) error {
		if err := c.replaceIntermediate(ctx, st, s.root, now); err != nil {
			return err
		}
		return c.activateJWT(st, now)
	})
	if err == nil {
		cert := c.current.Load().intermediate
		c.cfg.Log.Info("intermediate renewed", "serial", cert.SerialNumber.String(), "expires", cert.NotAfter, "kid", c.current.Load().jwt.id)
	}
	return err
}

// replaceIntermediate makes one under the root that st.Root names.
func (c *CA) replaceIntermediate(ctx context.Context, st *state, root *x509.Certificate, now time.Time) error {
	key, err := c.keys.load(st.root())
	if err != nil {
		return err
	}
	name, err := c.newIntermediate(root, key, now)
	if err == nil {
		st.Intermediate = name
	}
	return err
}

// activateJWT lets the next JWT key sign. Without a published one, after an
// outage, a new key signs at once: late is better than with a key that expires.
func (c *CA) activateJWT(st *state, now time.Time) error {
	old := st.JWT
	st.JWT = nil
	for _, r := range old {
		if !r.Expires.After(now) {
			continue
		}
		if r.Role == roleActive {
			r.Role = roleRetired
		}
		st.JWT = append(st.JWT, r)
	}
	if i := slices.IndexFunc(st.JWT, isNext); i >= 0 {
		st.JWT[i].Role = roleActive
		return nil
	}
	r, err := c.newJWTKey(roleActive, now)
	if err == nil {
		st.JWT = append(st.JWT, r)
	}
	return err
}

// change edits a copy of the state, writes it and lets it sign. Whatever edit
// makes it names in the state, so that nothing stays of an attempt that fails:
// retries on a full disk would pile up keys. The caller holds c.mu.
func (c *CA) change(ctx context.Context, edit func(*state) error) error {
	before, st := c.state, c.state
	st.JWT = slices.Clone(st.JWT)
	if r := st.Rotation; r != nil {
		own := *r
		own.Others = slices.Clone(r.Others)
		st.Rotation = &own
	}
	st.Sequence++
	var s *signing
	err := edit(&st)
	if err == nil {
		s, err = c.assemble(ctx, st)
	}
	var data []byte
	if err == nil {
		data, err = encodeState(st)
	}
	if err == nil {
		err = c.write(c.file(stateFile), data, 0o600)
	}
	if err != nil {
		// The state may have reached the disk although writing it failed.
		if onDisk, readErr := os.ReadFile(c.file(stateFile)); readErr == nil && (data == nil || !bytes.Equal(onDisk, data)) {
			c.forget(st, before)
		}
		return err
	}
	c.state = st
	c.current.Store(s)
	close(c.changed)
	c.changed = make(chan struct{})
	c.forget(before, st)
	return nil
}

// forget removes the files that no state names any more. A file that stays
// because of an error is of no consequence but to a tidy mind, so it is logged.
func (c *CA) forget(before, now state) {
	keep := map[string]bool{}
	for _, name := range now.certificates() {
		keep[name] = true
	}
	for _, r := range now.JWT {
		keep[r.KeyID] = true
	}
	for _, name := range before.certificates() {
		if !keep[name] {
			keep[name] = true
			c.remove(name)
		}
	}
	for _, r := range before.JWT {
		if !keep[r.KeyID] {
			c.removeKey(r.KeyID)
		}
	}
}

// remove takes away a certificate and its key, the key first: what a crash
// leaves is swept by the name of the certificate.
func (c *CA) remove(name string) {
	if !c.keyless(name) {
		c.removeKey(name)
	}
	c.removeChain(name)
	if err := os.Remove(c.file(name + ".crt")); err != nil {
		c.cfg.Log.Warn("retired certificate stays", "path", c.file(name+".crt"), "err", err)
	}
}

func (c *CA) removeKey(name string) {
	if err := c.keys.remove(name); err != nil {
		c.cfg.Log.Warn("retired key stays", "key", c.keys.where(name), "err", err)
	}
}

// sweep removes the certificates, with their keys, that a crash left behind
// before any state named them.
func (c *CA) sweep() {
	keep := map[string]bool{}
	for _, name := range c.state.certificates() {
		keep[name] = true
	}
	for _, pattern := range []string{"root-*.crt", "intermediate-*.crt"} {
		found, _ := filepath.Glob(c.file(pattern)) // the patterns are well formed
		for _, path := range found {
			if name := strings.TrimSuffix(filepath.Base(path), ".crt"); !keep[name] {
				c.remove(name)
			}
		}
	}
}

// create makes the root, the first intermediate and the first JWT key, then
// the state that names them.
func (c *CA) create(ctx context.Context) error {
	now := c.cfg.Now()
	made := c.newRoot
	if c.cfg.RootDir != "" {
		made = c.importRoot
	}
	root, key, err := made(ctx, rootName, now)
	if err != nil {
		return err
	}
	name, err := c.newIntermediate(root, key, now)
	if err != nil {
		return err
	}
	jwt, err := c.newJWTKey(roleActive, now)
	if err != nil {
		return err
	}
	st := state{Version: 1, TrustDomain: c.cfg.TrustDomain.Name(), Intermediate: name, Sequence: 1, JWT: []jwtKeyRecord{jwt}}
	data, err := encodeState(st)
	if err != nil {
		return err
	}
	if err := c.write(c.file(stateFile), data, 0o600); err != nil {
		return err
	}
	c.state = st
	c.cfg.Log.Info("CA created", "trust_domain", st.TrustDomain, "root_expires", root.NotAfter)
	return nil
}

// newRoot makes a root and stores it with its key.
func (c *CA) newRoot(ctx context.Context, name string, now time.Time) (*x509.Certificate, crypto.Signer, error) {
	fail := func(err error) (*x509.Certificate, crypto.Signer, error) {
		return nil, nil, fmt.Errorf("make root: %w", err)
	}
	template, err := c.caTemplate("root", 2, now, now.Add(c.cfg.RootTTL))
	if err != nil {
		return fail(err)
	}
	key, err := c.keys.create(name)
	if err != nil {
		return fail(err)
	}
	root, err := c.certify(name, template, template, key, key)
	if err != nil {
		return fail(err)
	}
	return root, key, nil
}

// certify signs the certificate of a CA and stores it. The key that was made
// for it goes when it fails.
func (c *CA) certify(name string, template, parent *x509.Certificate, key, by crypto.Signer) (*x509.Certificate, error) {
	cert, err := x509util.CreateCertificate(template, parent, key.Public(), by)
	if err == nil {
		err = lintCA(cert, c.cfg.TrustDomain, template.MaxPathLen)
	}
	if err == nil && parent != template {
		err = cert.CheckSignatureFrom(parent)
	}
	if err == nil {
		err = c.saveCert(name, cert)
	}
	if err != nil {
		c.removeKey(name)
		return nil, err
	}
	return cert, nil
}

// newIntermediate makes an intermediate under the root and stores it with its
// key. Its name has the serial number, so that old and new never share a file.
func (c *CA) newIntermediate(root *x509.Certificate, rootKey crypto.Signer, now time.Time) (string, error) {
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("make intermediate: %w", err)
	}
	end := now.Add(c.cfg.IntermediateTTL)
	if end.After(root.NotAfter) {
		end = root.NotAfter
		c.cfg.Log.Warn("intermediate is cut short by the root", "root_expires", root.NotAfter)
	}
	if !end.After(now) {
		return fail(fmt.Errorf("the root expired at %s", utc(root.NotAfter)))
	}
	template, err := c.caTemplate("intermediate", max(root.MaxPathLen-1, 0), now, end)
	if err != nil {
		return fail(err)
	}
	name := "intermediate-" + hex.EncodeToString(template.SerialNumber.Bytes())[:12]
	key, err := c.keys.create(name)
	if err != nil {
		return fail(err)
	}
	if _, err := c.certify(name, template, root, key, rootKey); err != nil {
		return fail(err)
	}
	return name, nil
}

// caTemplate is a signing certificate: the trust domain as its only URI, no
// path, and nothing but the right to sign certificates and CRLs.
func (c *CA) caTemplate(name string, pathLen int, now, end time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject: pkix.Name{
			Organization: []string{"Sallyport"},
			CommonName:   name + " " + hex.EncodeToString(serial.Bytes())[:8],
		},
		URIs:                  []*url.URL{c.cfg.TrustDomain.ID().URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            pathLen,
		MaxPathLenZero:        pathLen == 0,
		SignatureAlgorithm:    x509.ECDSAWithSHA256,
	}, nil
}

// newSerial is a random number of 128 bits whose first bit is set: all have
// one length, and none is zero.
func newSerial() (*big.Int, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	b[0] |= 0x80
	return new(big.Int).SetBytes(b[:]), nil
}
