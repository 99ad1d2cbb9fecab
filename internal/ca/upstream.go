package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

const (
	// askFirst and askMost are the pauses between the questions to an upstream
	// authority that does not answer; they double in between.
	askFirst = 5 * time.Second
	askMost  = time.Minute
)

// An offer is an intermediate that the upstream authority signed. Its files are
// there; the state does not name them yet.
type offer struct {
	name, rootName string
	cert, root     *x509.Certificate
}

// asking is what the CA remembers of its upstream authority.
type asking struct {
	// offered is for the step under way; nil between steps.
	offered *offer
	// again is when to ask next after a failure, pause how long that was.
	again time.Time
	pause time.Duration
}

// ask has an intermediate signed by the upstream authority, checks what comes
// back and stores it. The caller holds moving and not mu: it may take a while.
func (c *CA) ask(ctx context.Context) (*offer, error) {
	o, err := c.askAndStore(ctx, c.cfg.Now())
	if err != nil {
		err = fmt.Errorf("ask the upstream authority for an intermediate: %w", err)
	}
	if ctx.Err() == nil && c.cfg.OnUpstream != nil {
		c.cfg.OnUpstream(err)
	}
	return o, err
}

func (c *CA) askAndStore(ctx context.Context, now time.Time) (*offer, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	id := hex.EncodeToString(serial.Bytes())
	o := &offer{name: "intermediate-" + id[:12]}
	key, err := c.keys.create(o.name)
	if err != nil {
		return nil, err
	}
	chain, err := c.askFor(ctx, "intermediate "+id[:8], key, now)
	if err == nil {
		o.cert, o.root = chain[0], chain[len(chain)-1]
		o.rootName = rootName + "-" + RootID(o.root)[:16]
		err = c.cfg.Audit.Append(c.askRecord("done", fmt.Sprintf("serial %x until %s under root %s", o.cert.SerialNumber, utc(o.cert.NotAfter), RootID(o.root))))
	}
	if err == nil {
		err = c.storeOffer(o, chain[1:len(chain)-1])
	}
	if err != nil {
		c.removeKey(o.name)
		return nil, err
	}
	return o, nil
}

// storeOffer writes the certificate last: what is swept goes by its name.
func (c *CA) storeOffer(o *offer, above []*x509.Certificate) error {
	if err := c.saveCert(o.rootName, o.root); err != nil {
		return err
	}
	var chain bytes.Buffer
	for _, x := range above {
		_ = pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: x.Raw}) // a Buffer does not fail
	}
	if err := c.write(c.file(o.name+".chain"), chain.Bytes(), 0o644); err != nil {
		return err
	}
	return c.saveCert(o.name, o.cert)
}

// askFor returns the intermediate, those above it and the root. An authority
// that ends before the intermediate would is asked for a shorter life.
func (c *CA) askFor(ctx context.Context, name string, key crypto.Signer, now time.Time) ([]*x509.Certificate, error) {
	subject := pkix.Name{CommonName: name}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject, URIs: []*url.URL{c.cfg.TrustDomain.ID().URL()}}, key)
	if err != nil {
		return nil, fmt.Errorf("make CSR: %w", err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("make CSR: %w", err)
	}
	life := c.cfg.IntermediateTTL
	for {
		if err := c.cfg.Audit.Append(c.askRecord("intent", fmt.Sprintf("%s for %v", name, life))); err != nil {
			return nil, fmt.Errorf("record: %w", err)
		}
		chain, err := c.askOnce(ctx, &apiv1.CreateCertificateRequest{CSR: csr, Lifetime: life, Backdate: backdate,
			Template: &x509.Certificate{Subject: subject, URIs: csr.URIs}})
		if err != nil {
			return nil, err
		}
		end := chain[0].NotAfter
		for _, x := range chain[1:] {
			if x.NotAfter.Before(end) {
				end = x.NotAfter
			}
		}
		if left := end.Sub(now).Truncate(time.Second); end.Before(chain[0].NotAfter) && life == c.cfg.IntermediateTTL && left > c.cfg.floor() && left < life {
			c.cfg.Log.Warn("intermediate is cut short by the upstream authority", "upstream_expires", end)
			life = left
			continue
		}
		if err := lintUpstream(chain, c.cfg.TrustDomain, key.Public(), now, now.Add(c.cfg.floor())); err != nil {
			return nil, daemon.Hint(fmt.Errorf("what it signed is refused: %w", err), "mend its template and path length; docs/upstream-ca.md has one that works")
		}
		if got := chain[0].NotAfter.Sub(now); got < life/2 {
			c.cfg.Log.Warn("the upstream authority signs for a shorter time than it is asked for", "asked", life, "got", got)
		}
		return chain, nil
	}
}

// askOnce waits for an answer or for ctx: the interface knows no context. The
// service has to bound its calls.
func (c *CA) askOnce(ctx context.Context, req *apiv1.CreateCertificateRequest) ([]*x509.Certificate, error) {
	type answer struct {
		resp *apiv1.CreateCertificateResponse
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		resp, err := c.cfg.Upstream.CreateCertificate(req)
		done <- answer{resp, err}
	}()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case a := <-done:
		if a.err != nil {
			return nil, a.err
		}
		if a.resp == nil || a.resp.Certificate == nil || len(a.resp.CertificateChain) == 0 || slices.Contains(a.resp.CertificateChain, nil) {
			return nil, errors.New("it answered without a chain up to its root")
		}
		return append([]*x509.Certificate{a.resp.Certificate}, a.resp.CertificateChain...), nil
	}
}

// askIfDue asks for a successor of the intermediate when it is time. The caller
// holds moving. A failure is asked about again after a pause.
func (c *CA) askIfDue(ctx context.Context) error {
	now := c.cfg.Now()
	s := c.current.Load()
	if s == nil {
		return nil
	}
	_, due := times(s.intermediate)
	c.mu.Lock()
	wait := now.Before(due) || now.Before(c.up.again) || c.state.Rotation.phase() == Prepared
	c.mu.Unlock()
	if wait {
		return nil
	}
	o, err := c.ask(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.up.pause = min(max(2*c.up.pause, askFirst), askMost)
		c.up.again = now.Add(c.up.pause)
		return err
	}
	c.up.offered, c.up.pause, c.up.again = o, 0, time.Time{}
	return nil
}

// offering runs what an operator asked for, with an intermediate from the
// upstream authority at hand when the step needs one.
func (c *CA) offering(ctx context.Context, needs func(Phase) bool, do func(*signing, time.Time) error) error {
	if c.cfg.Upstream == nil {
		return c.operate(do)
	}
	c.moving.Lock()
	defer c.moving.Unlock()
	c.mu.Lock()
	asks := needs(c.state.Rotation.phase())
	c.mu.Unlock()
	if asks {
		o, err := c.ask(ctx)
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.up.offered = o
		c.mu.Unlock()
		defer c.dropOffer()
	}
	return c.operate(do)
}

// dropOffer removes what no step took. The caller holds moving and not mu.
func (c *CA) dropOffer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.up.offered
	c.up.offered = nil
	if o == nil {
		return
	}
	// A state that names them may be on the disk although writing it failed.
	onDisk, err := os.ReadFile(c.file(stateFile))
	for _, name := range []string{o.name, o.rootName} {
		if err == nil && !slices.Contains(c.state.certificates(), name) && !bytes.Contains(onDisk, []byte(`"`+name+`"`)) {
			c.remove(name)
		}
	}
}

// takeOffer lets what was offered sign; one under another root waits until
// every proxy trusts that. The caller holds mu.
func (c *CA) takeOffer(ctx context.Context, s *signing, now time.Time) error {
	o := c.up.offered
	if o.root.Equal(s.root) {
		return c.change(ctx, func(st *state) error {
			st.Intermediate = o.name
			return c.activateJWT(st, now)
		})
	}
	if phase := c.state.Rotation.phase(); phase != Steady {
		c.up.again = now.Add(askMost)
		return fmt.Errorf("the upstream authority signs under root %.16s, which has to wait until the rotation that is %s has ended", RootID(o.root), phase)
	}
	c.cfg.Log.Warn("the upstream authority has another root: it signs once every proxy trusts it", "root", RootID(o.root))
	return c.take(ctx, StepPrepare, ByTime, now)
}

// prepareOffer makes what was offered the next to sign. A root that is the same
// needs no place of its own in the bundle.
func (c *CA) prepareOffer(st *state, now time.Time) error {
	o := c.up.offered
	if o == nil {
		return errors.New("the upstream authority was not asked")
	}
	st.Rotation.Phase, st.Rotation.Ready, st.Rotation.Others = Prepared, o.name, nil
	if o.rootName != st.root() {
		st.Rotation.Others = []string{o.rootName}
	}
	return c.addNext(st, now)
}

// swapUpstream is swap with what the upstream authority signed before: Ready, or
// on the way back what signed until then.
func (c *CA) swapUpstream(st *state, to Phase, now time.Time) error {
	r := st.Rotation
	next := r.Ready
	if to == Withdrawn {
		next = r.Intermediate
	}
	if next == "" {
		return daemon.Hint(errors.New("the upstream authority has signed no intermediate that could follow"), "sallyport ca rotate")
	}
	cert, err := c.loadCert(next)
	if err != nil {
		return err
	}
	if !now.Before(cert.NotAfter) {
		return daemon.Hint(fmt.Errorf("the intermediate that would follow expired at %s", utc(cert.NotAfter)), "sallyport ca rollback, then sallyport ca rotate")
	}
	former := st.Intermediate
	st.Intermediate, r.Ready, r.Intermediate = next, "", ""
	if len(r.Others) == 0 {
		st.Rotation = nil // every proxy trusts the root already
		return c.activateJWT(st, now)
	}
	last := len(r.Others) - 1
	st.Root, r.Others[last] = r.Others[last], st.root()
	r.Phase = to
	if to == Withdrawn {
		st.restoreJWT(now)
		st.taintJWT()
		return nil
	}
	r.Intermediate = former
	return c.activateJWT(st, now)
}

// createUpstream asks for the first intermediate, and makes the first JWT key
// and the state that names them.
func (c *CA) createUpstream(ctx context.Context) error {
	now := c.cfg.Now()
	o, err := c.ask(ctx)
	if err != nil {
		return err
	}
	jwt, err := c.newJWTKey(roleActive, now)
	if err != nil {
		return err
	}
	st := state{Version: 1, TrustDomain: c.cfg.TrustDomain.Name(), Upstream: true, Root: o.rootName, Intermediate: o.name, Sequence: 1, JWT: []jwtKeyRecord{jwt}}
	data, err := encodeState(st)
	if err == nil {
		err = c.write(c.file(stateFile), data, 0o600)
	}
	if err != nil {
		return err
	}
	c.state = st
	c.cfg.Log.Info("CA created under an upstream authority", "trust_domain", st.TrustDomain, "root", RootID(o.root), "intermediate_expires", o.cert.NotAfter)
	return nil
}

// loadAbove reads the certificates between an intermediate and the root.
func (c *CA) loadAbove(name string) ([]*x509.Certificate, error) {
	if c.cfg.Upstream == nil {
		return nil, nil
	}
	path := c.file(name + ".chain")
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, daemon.Hint(fmt.Errorf("read what stands above the intermediate: %w", err), "restore it from a backup")
	}
	var out []*x509.Certificate
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, daemon.Hint(fmt.Errorf("%s is damaged: not a list of PEM certificates", path), "restore it from a backup")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, daemon.Hint(fmt.Errorf("%s is damaged: %w", path, err), "restore it from a backup")
		}
		out = append(out, cert)
	}
	return out, nil
}

// rootOf loads a root: with its key when it is ours.
func (c *CA) rootOf(name string) (*x509.Certificate, error) {
	if c.cfg.Upstream == nil {
		cert, _, err := c.pair(name, 1)
		return cert, err
	}
	cert, err := c.loadCert(name)
	if err == nil {
		err = lintUpstreamRoot(cert)
	}
	return cert, err
}

// removeChain removes what stands beside an intermediate of an upstream
// authority.
func (c *CA) removeChain(name string) {
	if err := os.Remove(c.file(name + ".chain")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.cfg.Log.Warn("retired chain stays", "path", c.file(name+".chain"), "err", err)
	}
}

// keyless says that a name is of a root whose key is elsewhere.
func (c *CA) keyless(name string) bool {
	return c.cfg.Upstream != nil && strings.HasPrefix(name, rootName)
}

// askRecord is the audit record of a question, or of an answer that is taken.
func (c *CA) askRecord(reason, detail string) *audit.Record {
	return &audit.Record{Time: c.cfg.Now(), Kind: audit.KindIssue, Reason: reason, Dst: c.cfg.TrustDomain.IDString(), Detail: "intermediate by the upstream authority: " + detail}
}

// askAgain is when the upstream authority is asked after a failure.
func (c *CA) askAgain() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.up.again
}

// upstreamSchedule has no time to prepare: the upstream authority does that, by
// signing under another root. That signs as soon as every proxy trusts it, and
// before what signs now has ended. The caller holds mu.
func (c *CA) upstreamSchedule(s *signing) schedule {
	begin, end := s.intermediate.NotBefore, s.intermediate.NotAfter
	plan := scheduleOf(begin, end, c.cfg.IntermediateTTL, c.cfg.X509TTL)
	plan.prepare = end.AddDate(1000, 0, 0)
	if r := c.state.Rotation; r != nil && r.Pace == ByTime {
		plan.activate = time.Time{}
	}
	return plan
}

// signAnew lets another root sign, under a new intermediate.
func (c *CA) signAnew(ctx context.Context, st *state, now time.Time) error {
	if o := c.up.offered; o != nil {
		st.Root, st.Intermediate = o.rootName, o.name
		return nil
	}
	name, root, err := c.anotherRoot(ctx, now)
	if err != nil {
		return err
	}
	st.Root = name
	return c.replaceIntermediate(ctx, st, root, now)
}

func isSteady(p Phase) bool { return p == Steady }

func always(Phase) bool { return true }

func errSameRoot() error {
	return daemon.Hint(fmt.Errorf("%w: the upstream authority signs under the same root still, which what leaked leads to", ErrGate),
		"give it another root first; sallyport ca rotate --through replaces the intermediate and the JWT key meanwhile")
}

// intermediates are those of Rotation. The caller holds mu.
func (c *CA) intermediates(s *signing) []Intermediate {
	if c.cfg.Upstream == nil {
		return nil
	}
	of := func(cert, root *x509.Certificate) Intermediate {
		return Intermediate{ID: hex.EncodeToString(cert.SubjectKeyId), RootKeyID: hex.EncodeToString(root.SubjectKeyId), Expires: cert.NotAfter}
	}
	out := []Intermediate{of(s.intermediate, s.root)}
	out[0].Signs = true
	if ready := c.readyCert(); ready != nil {
		root := s.root
		if len(s.others) > 0 {
			root = s.others[len(s.others)-1]
		}
		next := of(ready, root)
		next.Next = true
		out = append(out, next)
	}
	if f := s.former; f != nil {
		out = append(out, of(f.intermediate, f.root))
	}
	return out
}

// readyCert is what an upstream authority signed and does not sign yet, nil for
// none. The caller holds mu.
func (c *CA) readyCert() *x509.Certificate {
	if r := c.state.Rotation; c.cfg.Upstream != nil && r != nil && r.Ready != "" {
		if cert, err := c.loadCert(r.Ready); err == nil {
			return cert
		}
	}
	return nil
}

// movable are the IDs that a step may name. Under an upstream authority it is
// the intermediate that is activated: its root may be the same as before.
func (c *CA) movable(s *signing, step Step) []string {
	ids := idsOf(s.others)
	if c.cfg.Upstream == nil || step != StepActivate {
		return ids
	}
	if ready := c.readyCert(); ready != nil {
		ids = append(ids, hex.EncodeToString(ready.SubjectKeyId))
	}
	return ids
}
