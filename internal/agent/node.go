package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	mrand "math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/svid"
)

const (
	retryMin = 200 * time.Millisecond
	retryMax = 10 * time.Second
	// refusedMax is retryMax for an issuer that answers and says no: only a
	// person can mend that.
	refusedMax = time.Minute
	// attestGap is how long after an attestation a call that was on its way
	// before may still fail for want of it.
	attestGap = 5 * time.Second
)

// again says that an error may go away by itself.
func again(err error) bool {
	return errors.Is(err, control.ErrUnreachable) || errors.Is(err, control.ErrFailed)
}

// noticed wakes the renewal when an error says that the node must attest anew.
func (a *Agent) noticed(err error) {
	if !errors.Is(err, control.ErrMustReattest) {
		return
	}
	a.noticing.Lock()
	defer a.noticing.Unlock()
	if time.Now().UnixNano()-a.attested.Load() < int64(attestGap) {
		return
	}
	select {
	case a.must <- struct{}{}:
	default: // it is known
	}
}

// proved notes that the node has attested. Calls that failed meanwhile, because
// the issuer knows the new identity and they had the old one, ask for nothing.
func (a *Agent) proved() {
	a.noticing.Lock()
	defer a.noticing.Unlock()
	a.attested.Store(time.Now().UnixNano())
	select {
	case <-a.must:
	default:
	}
}

// attest proves this node to an issuer. An issuer that does not answer, or that
// fails, is tried again until ctx ends; a refusal is final.
func (a *Agent) attest(ctx context.Context) error {
	key, err := a.nodeKey()
	if err != nil {
		return err
	}
	for pause := retryMin; ; pause = min(2*pause, retryMax) {
		got, err := a.attestOnce(ctx, key)
		if err == nil {
			if err := a.keepNode(got, key); err != nil {
				return err
			}
			a.proved()
			a.cfg.Log.Info("node attested", "agent", got.ID.String())
			if a.evidence != nil {
				return nil // the issuer may have tied the evidence to this key
			}
			return a.dropNodeKey()
		}
		if !again(err) || ctx.Err() != nil {
			return err
		}
		if _, none := a.Self(); none != nil {
			a.cfg.Ready.Set(readySVID, err)
		}
		a.cfg.Log.Warn("not attested yet, trying again", "err", err)
		if !wait(ctx, pause/2+mrand.N(pause)) {
			return err
		}
	}
}

// attestOnce gathers the evidence anew: a file may have been replaced since the
// last attempt.
func (a *Agent) attestOnce(ctx context.Context, key crypto.Signer) (control.AgentSVID, error) {
	if e := a.evidence; e != nil {
		payload, err := e.Payload(ctx)
		if err != nil {
			return control.AgentSVID{}, daemon.Hint(fmt.Errorf("gather %s evidence: %w", e.Kind(), err), "correct issuer.attest in the configuration")
		}
		return a.client.AttestAnswering(ctx, e.Kind(), payload, e.Answer, key)
	}
	token, err := a.joinToken()
	if err != nil {
		return control.AgentSVID{}, err
	}
	return a.client.Attest(ctx, attest.JoinToken, []byte(token), key)
}

// wait pauses; false means that ctx has ended.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (a *Agent) joinToken() (string, error) {
	token := a.cfg.Join.JoinToken
	if f := a.cfg.Join.JoinTokenFile; token == "" && f != "" {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", daemon.Hint(fmt.Errorf("read issuer.join_token_file: %w", err), "sallyport token create AGENT > "+f)
		}
		token = strings.TrimSpace(string(b))
	}
	if token == "" {
		return "", daemon.Hint(errors.New("this node is not attested and has no join token"), "sallyport token create AGENT, and give the token as issuer.join_token_file")
	}
	return token, nil
}

// nodeKey is the key to be certified. It is on disk before the token is used:
// if the answer is lost, even by a crash, the same key gets it again.
func (a *Agent) nodeKey() (crypto.Signer, error) {
	path := a.file(keyFile)
	b, err := os.ReadFile(path)
	if err == nil {
		if block, _ := pem.Decode(b); block != nil {
			if k, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
				return k, nil
			}
		}
		a.cfg.Log.Warn("key of an unfinished attestation is damaged, making a new one", "file", path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read node key: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, daemon.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

// dropNodeKey removes the copy that waited for an answer.
func (a *Agent) dropNodeKey() error {
	if err := os.Remove(a.file(keyFile)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// keepNode makes an agent SVID the node's identity, on disk first.
func (a *Agent) keepNode(got control.AgentSVID, key crypto.Signer) error {
	st := &svid.State{
		Identities: []svid.Identity{{ID: got.ID, Chain: got.Chain, Key: key, EntryID: "node"}},
		Bundle:     a.bundleOf(a.trusted()),
	}
	if err := st.Validate(time.Now()); err != nil {
		return fmt.Errorf("agent SVID from the issuer: %w", err)
	}
	if err := st.Save(a.file(nodeFile)); err != nil {
		return err
	}
	a.cfg.Metrics.CertExpiry("node").Set(got.Chain[0].NotAfter)
	return a.node.Set(st)
}

// renewNode renews the node's identity at half its life. A node that must
// attest again does so with the token it finds, and keeps trying: the operator
// may bring a new one. The workload's traffic goes on meanwhile.
func (a *Agent) renewNode(ctx context.Context) error {
	pause := retryMin
	for {
		id, err := a.nodeIdentity()
		if err == nil {
			leaf := id.Chain[0]
			if err = a.untilRenewal(ctx, leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore)/2)); err == nil {
				err = a.renewOnce(ctx)
			}
		}
		if errors.Is(err, control.ErrMustReattest) || errors.Is(err, svid.ErrExpired) || errors.Is(err, svid.ErrNoIdentity) {
			a.cfg.Log.Warn("node must attest again", "err", err)
			if err = a.attest(ctx); err == nil {
				a.rot.Sync()
			}
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the end that was asked for
		}
		if err == nil {
			pause = retryMin
			continue
		}
		a.cfg.Log.Error("node identity not renewed", "err", err)
		if !wait(ctx, pause/2+mrand.N(pause)) {
			return nil
		}
		most := refusedMax
		if again(err) {
			most = retryMax
		}
		pause = min(2*pause, most)
	}
}

// untilRenewal waits for a moment. An error says that there is no waiting.
func (a *Agent) untilRenewal(ctx context.Context, at time.Time) error {
	for {
		left := time.Until(at)
		if left <= 0 {
			return nil
		}
		timer := time.NewTimer(min(left, clockEvery))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-a.must:
			timer.Stop()
			return control.ErrMustReattest
		case <-a.renewNow:
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

func (a *Agent) renewOnce(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	got, err := a.client.Renew(ctx, key)
	if err != nil {
		return err
	}
	return a.keepNode(got, key)
}

// minter is the issuer as the rotator sees it.
type minter struct{ a *Agent }

func (m minter) Entries(ctx context.Context) ([]mesh.Entry, error) {
	es, err := m.a.client.SyncEntries(ctx)
	m.a.noticed(err)
	if err == nil {
		m.a.keepEntries(es) // Trust follows, and depends on them
	}
	return es, err
}

func (m minter) Trust(ctx context.Context) (svid.Trust, error) {
	b, err := m.a.client.GetBundle(ctx)
	if err != nil {
		m.a.noticed(err)
		return svid.Trust{}, err
	}
	t := svid.Trust{Bundle: m.a.bundleOf(b.X509), Tainted: b.Tainted, JWTKeys: map[string]crypto.PublicKey{}}
	for _, k := range b.JWT {
		t.JWTKeys[k.KeyID] = k.PublicKey
	}
	m.a.tainted(t)
	return t, m.federated(ctx, &t)
}

// federated adds the bundles of the trust domains that entries name. One that
// the issuer does not have is left out: nobody of it is trusted.
func (m minter) federated(ctx context.Context, t *svid.Trust) error {
	t.Federated = map[spiffeid.TrustDomain]*x509bundle.Bundle{}
	t.FederatedJWT = map[spiffeid.TrustDomain]map[string]crypto.PublicKey{}
	for _, e := range m.a.Entries() {
		for _, td := range e.FederatesWith {
			if t.Federated[td] != nil {
				continue
			}
			b, err := m.a.client.GetFederatedBundle(ctx, td)
			if errors.Is(err, control.ErrRefused) {
				m.a.cfg.Log.Warn("the issuer has no bundle of a trust domain that an entry federates with", "trust_domain", td.Name(), "err", err)
				continue
			}
			if err != nil {
				return err
			}
			t.Federated[td] = x509bundle.FromX509Authorities(td, b.X509)
			t.FederatedJWT[td] = map[string]crypto.PublicKey{}
			for _, k := range b.JWT {
				t.FederatedJWT[td][k.KeyID] = k.PublicKey
			}
		}
	}
	return nil
}

func (m minter) MintX509(ctx context.Context, e mesh.Entry, key crypto.Signer) (_ []*x509.Certificate, err error) {
	res, err := m.a.client.NewX509SVIDs(ctx, []control.SVIDRequest{{EntryID: e.ID, ID: e.SPIFFEID, Key: key}})
	defer func() {
		result := "ok"
		if err != nil {
			result = "failed"
		}
		m.a.cfg.Metrics.Rotations(result).Inc()
	}()
	if err != nil {
		m.a.noticed(err)
		return nil, err
	}
	if len(res) != 1 {
		return nil, fmt.Errorf("issuer answered one request for an SVID with %d results", len(res))
	}
	return res[0].Chain, res[0].Err
}

// MintJWT is svid.JWTMinter.
func (a *Agent) MintJWT(ctx context.Context, entryID string, audience []string) (string, error) {
	j, err := a.client.NewJWTSVID(ctx, entryID, audience)
	a.noticed(err)
	return j.Token, err
}
