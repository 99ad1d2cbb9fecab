package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyport/internal/daemon"
)

const (
	exchangeName = "exchange"
	// meeting bounds one round of talk with the other issuers.
	meeting = 5 * time.Second
	// admission is how long a new issuer waits until the others have sealed the
	// keys for it.
	admission = 10 * time.Second
)

// ErrMoved says that another issuer took a step at the same time.
var ErrMoved = fmt.Errorf("%w: another issuer took a step a moment ago", ErrGate)

// Peers are the issuers that share the root, by the store they share. It is
// safe for concurrent use, and retries nothing that the caller could not.
type Peers interface {
	// RootPlan returns the record of the roots, nil before the first.
	RootPlan(ctx context.Context) ([]byte, error)
	// EditRootPlan lets one issuer at a time replace the record: what edit makes
	// of it is written, with the root that signs, only while the lease lasts and
	// nobody wrote meanwhile. Nil leaves all as it is.
	EditRootPlan(ctx context.Context, edit func(was []byte) (plan, root []byte, err error)) error
	// TellIssuers replaces what this issuer said before.
	TellIssuers(ctx context.Context, name string, said []byte) error
	// IssuersSay returns what each live issuer said last, by name: nil of one
	// that said nothing yet.
	IssuersSay(ctx context.Context) (map[string][]byte, error)
}

// company is a CA among others. moving guards it, but for council.
type company struct {
	peers  Peers
	name   string
	secret hpke.PrivateKey
	said   []byte // the last report, unsigned
}

// council is what the live issuers said last: nil for one that said nothing
// that counts.
type council struct {
	reports map[string]*report
	at      time.Time
}

// known says that the council is not of long ago.
func (k council) known(now time.Time) bool { return k.reports != nil && now.Sub(k.at) < 2*meeting }

// Join lets the CA share its root with other issuers: from now on each step is
// taken by one of them, for all. It brings the roots up to date first, so that
// nothing is signed under one that was replaced. Call it once, before Run. Name
// is this issuer's over restarts.
func (c *CA) Join(ctx context.Context, name string, peers Peers) error {
	c.moving.Lock()
	defer c.moving.Unlock()
	secret, err := c.exchangeKey()
	if err != nil {
		return fmt.Errorf("join the other issuers: %w", err)
	}
	co := &company{peers: peers, name: name, secret: secret}
	until := time.NewTimer(admission)
	defer until.Stop()
	for {
		err := c.attend(ctx, co)
		if err == nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.company = co
			return nil
		}
		if !errors.Is(err, errNoKey) {
			return fmt.Errorf("join the other issuers: %w", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-until.C:
			return fmt.Errorf("join the other issuers: %w", err)
		case <-time.After(gatePoll / 4):
		}
	}
}

// errNoKey says that the key of a root was not sealed for this issuer.
var errNoKey = daemon.Hint(errors.New("no other issuer has given this one the key of the new root"),
	"start one that has it; or empty the directory ca and name a copy of root.crt and root.key of that issuer in ca.root_dir")

// exchangeKey is what the keys of roots are sealed for.
func (c *CA) exchangeKey() (hpke.PrivateKey, error) {
	found, err := c.keys.has(exchangeName)
	if err != nil {
		return nil, err
	}
	if !found {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("make exchange key: %w", err)
		}
		if err := c.keys.adopt(exchangeName, key); err != nil {
			return nil, err
		}
	}
	signer, err := c.keys.load(exchangeName)
	if err != nil {
		return nil, err
	}
	key, ok := signer.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("the exchange key is no EC key in a file")
	}
	raw, err := key.ECDH()
	if err != nil {
		return nil, fmt.Errorf("exchange key: %w", err)
	}
	return hpke.NewDHKEMPrivateKey(raw)
}

// sharing returns the company, nil for a CA alone.
func (c *CA) sharing() *company {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.company
}

// meet brings this issuer and the others to one state, and takes the step that
// is due. The caller holds moving.
func (c *CA) meet(ctx context.Context, co *company) error {
	if err := c.attend(ctx, co); err != nil {
		return err
	}
	now := c.cfg.Now()
	c.mu.Lock()
	s := c.current.Load()
	if s == nil {
		c.mu.Unlock()
		return errors.New("CA is closed")
	}
	step, forced := c.schedule(s).due(c.state.Rotation, now)
	open := step != "" && (forced || c.gate(s, step).Open(now) == nil)
	pace := ByTime
	if r := c.state.Rotation; r != nil {
		pace = r.Pace
	}
	c.lookWhoLags()
	c.mu.Unlock()
	if !open {
		return nil
	}
	if forced {
		c.cfg.Log.Warn("root is near its end: the next one signs, whoever trusts it", "root_expires", s.root.NotAfter)
	}
	err := c.takeShared(ctx, co, step, pace, now)
	if errors.Is(err, ErrMoved) {
		return nil // the next round follows the other
	}
	return err
}

// attend follows the plan, hears the others and tells them. The caller holds
// moving.
func (c *CA) attend(ctx context.Context, co *company) error {
	ctx, cancel := context.WithTimeout(ctx, meeting)
	defer cancel()
	data, err := co.peers.RootPlan(ctx)
	if err != nil {
		return err
	}
	p, err := c.readPlan(data)
	if p == nil && err == nil {
		// There is none yet, or an old one was restored with the database.
		p, err = c.restorePlan(ctx, co)
	}
	if err != nil {
		return err
	}
	behind := c.follow(ctx, co, p, c.cfg.Now())
	if behind != nil && !errors.Is(behind, errNoKey) {
		return behind
	}
	if err := c.hear(ctx, co, p); err != nil {
		return err
	}
	if err := c.tell(ctx, co); err != nil {
		return err
	}
	if behind != nil {
		return behind
	}
	return c.admit(ctx, co, p)
}

func (c *CA) number() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.Number
}

// inEmergency reports whether the root before was replaced as one that leaked.
func (c *CA) inEmergency() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.Rotation.emergency()
}

// readPlan decodes a plan and checks that this issuer may follow it; nil for
// none, and for one that is older than what this issuer followed before.
func (c *CA) readPlan(data []byte) (*plan, error) {
	if data == nil {
		return nil, nil
	}
	p, err := decodePlan(data, c.cfg.TrustDomain)
	if err != nil || p.Number < c.number() {
		return nil, err
	}
	s := c.current.Load()
	if s == nil {
		return nil, errors.New("CA is closed")
	}
	if p.certs, err = p.vouched(c.cfg.TrustDomain, s.root, s.others); err != nil {
		return nil, err
	}
	if c.inEmergency() && slices.ContainsFunc(s.others, p.certs[0].Equal) {
		return nil, daemon.Hint(fmt.Errorf("the record of the shared roots lets root %.16s sign again, which was replaced in an emergency", p.ids()[0]),
			"change the password of the database, restore it from a backup, and find out who wrote to it")
	}
	return p, nil
}

// restorePlan makes the plan from what this issuer has.
func (c *CA) restorePlan(ctx context.Context, co *company) (*plan, error) {
	var made *plan
	err := co.peers.EditRootPlan(ctx, func(was []byte) ([]byte, []byte, error) {
		p, err := c.readPlan(was)
		if err != nil || p != nil {
			made = p
			return nil, nil, err
		}
		if was != nil {
			c.cfg.Log.Warn("the roots in the database are older than those of this issuer, which are put in force again", "number", c.number())
		}
		made = c.planOf()
		made.Issuers[co.name] = planIssuer{co.secret.PublicKey().Bytes(), today(c.cfg.Now())}
		return c.complete(made)
	})
	if err != nil {
		return nil, err
	}
	if made.certs == nil {
		s := c.current.Load()
		made.certs = append([]*x509.Certificate{s.root}, s.others...)
	}
	return made, nil
}

// planOf tells the state of this issuer as a plan. The other issuers are
// admitted when they have spoken.
func (c *CA) planOf() *plan {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.current.Load()
	p := &plan{
		Version: planVersion, TrustDomain: c.cfg.TrustDomain.Name(), Number: c.state.Number + 1,
		Phase: c.state.Rotation.phase(), Pace: ByTime, Issuers: map[string]planIssuer{},
	}
	if r := c.state.Rotation; r != nil {
		p.Pace, p.Since, p.Emergency = r.Pace, r.Since, r.Emergency
	}
	for _, root := range append([]*x509.Certificate{s.root}, s.others...) {
		p.Roots = append(p.Roots, planRoot{Cert: root.Raw, Keys: map[string][]byte{}})
	}
	return p
}

// complete seals what is missing in a plan, and signs and encodes it.
func (c *CA) complete(p *plan) (data, root []byte, err error) {
	keys, err := c.rootKeys()
	if err != nil {
		return nil, nil, err
	}
	return c.completeWith(p, keys)
}

func (c *CA) completeWith(p *plan, keys map[string]crypto.Signer) (data, root []byte, err error) {
	ids := p.ids()
	for i, r := range p.Roots {
		for name, is := range p.Issuers {
			if r.Keys[name] != nil {
				continue
			}
			if r.Keys[name], err = seal(is.Public, c.cfg.TrustDomain, name, ids[i], keys[ids[i]]); err != nil {
				return nil, nil, err
			}
		}
		for name := range r.Keys {
			if _, is := p.Issuers[name]; !is {
				delete(r.Keys, name)
			}
		}
	}
	data, err = p.encode(c.cfg.TrustDomain, keys[ids[0]])
	return data, p.Roots[0].Cert, err
}

// rootKeys are the keys of all roots that this issuer has, by ID.
func (c *CA) rootKeys() (map[string]crypto.Signer, error) {
	c.mu.Lock()
	st := c.state
	c.mu.Unlock()
	names := []string{st.root()}
	if r := st.Rotation; r != nil {
		names = append(names, r.Others...)
	}
	out := map[string]crypto.Signer{}
	for _, name := range names {
		cert, key, err := c.pair(name, 1)
		if err != nil {
			return nil, err
		}
		out[RootID(cert)] = key
	}
	return out, nil
}

// hear reads what the live issuers say.
func (c *CA) hear(ctx context.Context, co *company, p *plan) error {
	said, err := co.peers.IssuersSay(ctx)
	if err != nil {
		return err
	}
	now := council{reports: map[string]*report{}, at: c.cfg.Now()}
	for name, data := range said {
		now.reports[name] = nil
		r := new(report)
		if data == nil || json.Unmarshal(data, r) != nil {
			continue
		}
		if r.signedBy(p.certs[0], c.cfg.TrustDomain, name) || p.Phase == Activated && r.signedBy(p.certs[len(p.certs)-1], c.cfg.TrustDomain, name) {
			now.reports[name] = r
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.council = now
	return nil
}

// tell says to the others how far this issuer is, if that is new to them.
func (c *CA) tell(ctx context.Context, co *company) error {
	c.mu.Lock()
	s, st := c.current.Load(), c.state
	c.mu.Unlock()
	if s == nil {
		return errors.New("CA is closed")
	}
	r := report{Number: st.Number, Public: co.secret.PublicKey().Bytes(), Signs: RootID(s.root), Key: s.jwt.id}
	if i := slices.IndexFunc(st.JWT, isNext); i >= 0 {
		r.NextKey = st.JWT[i].KeyID
	}
	if rot := st.Rotation; rot != nil && rot.Ready != "" {
		r.Ready = RootID(s.others[len(s.others)-1])
	}
	body, err := r.body()
	if err != nil || bytes.Equal(body, co.said) {
		return err
	}
	key, err := c.keys.load(st.root())
	if err != nil {
		return err
	}
	if r, err = r.sign(key, c.cfg.TrustDomain, co.name); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := co.peers.TellIssuers(ctx, co.name, data); err != nil {
		return err
	}
	co.said = body
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.council.reports != nil {
		c.council.reports = maps.Clone(c.council.reports)
		c.council.reports[co.name] = &r
	}
	return nil
}

// admit gives the keys of the roots to issuers that have shown that they have
// the one that signs.
func (c *CA) admit(ctx context.Context, co *company, p *plan) error {
	now := c.cfg.Now()
	c.mu.Lock()
	here := c.council.reports
	c.mu.Unlock()
	wanting := func(p *plan) (names []string) {
		for name, r := range here {
			is, known := p.Issuers[name]
			if r != nil && (!known || !bytes.Equal(is.Public, r.Public) || now.Sub(is.Seen) >= seenEvery) {
				names = append(names, name)
			}
		}
		return names
	}
	if len(wanting(p)) == 0 {
		return nil
	}
	return co.peers.EditRootPlan(ctx, func(was []byte) ([]byte, []byte, error) {
		p, err := c.readPlan(was)
		if err != nil || p == nil || p.Number != c.number() {
			return nil, nil, err // the next round looks again
		}
		names := wanting(p)
		if len(names) == 0 {
			return nil, nil, nil
		}
		for _, name := range names {
			if !bytes.Equal(p.Issuers[name].Public, here[name].Public) {
				c.cfg.Log.Info("an issuer may have the keys of the roots", "issuer", name)
				for _, r := range p.Roots {
					delete(r.Keys, name)
				}
			}
			p.Issuers[name] = planIssuer{here[name].Public, today(now)}
		}
		return c.complete(p)
	})
}

func today(now time.Time) time.Time { return now.UTC().Truncate(time.Minute) }
