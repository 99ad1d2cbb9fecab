package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/daemon"
)

// ErrOtherRoot says that an issuer has a root that leads to none of the roots
// that the others sign under.
var ErrOtherRoot = errors.New("this issuer has another root than the trust domain")

const (
	planVersion = 1
	// stepEmergency and stepPace are no steps from phase to phase.
	stepEmergency Step = "emergency"
	stepPace      Step = "pace"
	// keepVouchers is how many replacements of the root an issuer may miss.
	keepVouchers = 16
	// forgetIssuer is when one that was not seen gets no further key.
	forgetIssuer = 30 * 24 * time.Hour
	seenEvery    = 24 * time.Hour

	planContext    = "sallyport root plan v1"
	voucherContext = "sallyport root voucher v1"
	reportContext  = "sallyport issuer report v1"
	keyContext     = "sallyport root key v1"
)

// A plan is how the roots stand that several issuers share. It is a record in
// the store they share, and each brings its own state to it.
//
// Who can write to the store can stop a rotation, but neither puts a root of
// its own in force nor learns a key: the root that signs has signed the plan,
// the issuer's own root vouches for it, and keys are sealed for each issuer.
type plan struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
	// Number grows by one with each step.
	Number    uint64    `json:"number"`
	Phase     Phase     `json:"phase"`
	Pace      Pace      `json:"pace"`
	Since     time.Time `json:"since"`
	Emergency bool      `json:"emergency,omitempty"`
	// Roots begin with the one that signs; then come those of rotation.Others.
	Roots []planRoot `json:"roots"`
	// Issuers are those that the keys are sealed for, by their name.
	Issuers map[string]planIssuer `json:"issuers"`
	// Vouchers lead from the roots of the past to those of today.
	Vouchers []voucher `json:"vouchers,omitempty"`
	// Signature is by the first of Roots.
	Signature []byte `json:"signature"`

	certs []*x509.Certificate // of Roots, once they are checked
}

type planRoot struct {
	Cert []byte `json:"cert"`
	// Keys holds the private key, sealed for each issuer.
	Keys map[string][]byte `json:"keys"`
}

type planIssuer struct {
	Public []byte    `json:"public"` // HPKE, P-256
	Seen   time.Time `json:"seen"`
}

// A voucher says by the key of one root that another may follow it.
type voucher struct {
	By        string `json:"by"`
	Cert      []byte `json:"cert"`
	Signature []byte `json:"signature"`
}

// A report is what an issuer says to the others.
type report struct {
	// Number is that of the plan which it follows.
	Number uint64 `json:"number"`
	// Public is the key that the keys of roots are sealed for.
	Public []byte `json:"public"`
	// Signs is the root above what it signs. Ready is the next one, once it has
	// an intermediate under it.
	Signs string `json:"signs"`
	Ready string `json:"ready,omitempty"`
	// Key is the JWT key that signs, and NextKey the one to come.
	Key     string `json:"key"`
	NextKey string `json:"next_key,omitempty"`
	// Signature is by the key of Signs.
	Signature []byte `json:"signature,omitempty"`
}

func decodePlan(data []byte, td spiffeid.TrustDomain) (*plan, error) {
	p := new(plan)
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err := dec.Decode(p)
	switch {
	case err != nil:
	case p.Version != planVersion:
		err = fmt.Errorf("version %d, this program knows %d", p.Version, planVersion)
	case p.TrustDomain != td.Name():
		err = fmt.Errorf("it is of trust domain %q", p.TrustDomain)
	case forward[p.Phase] == "" || (p.Phase == Steady) != (len(p.Roots) == 1) || len(p.Roots) == 0:
		err = fmt.Errorf("no rotation is %q with %d roots", p.Phase, len(p.Roots))
	}
	if err != nil {
		return nil, daemon.Hint(fmt.Errorf("the record of the shared roots is damaged: %w", err), "restore the database from a backup, or upgrade this issuer")
	}
	if p.Issuers == nil {
		p.Issuers = map[string]planIssuer{}
	}
	for i := range p.Roots {
		if p.Roots[i].Keys == nil {
			p.Roots[i].Keys = map[string][]byte{}
		}
	}
	return p, nil
}

// ids are the IDs of the roots, the one that signs first.
func (p *plan) ids() []string {
	out := make([]string, len(p.Roots))
	for i, r := range p.Roots {
		out[i] = RootID(&x509.Certificate{Raw: r.Cert})
	}
	return out
}

// step moves on the plan by a step that makes no root.
func (p *plan) step(step Step, pace Pace, now time.Time) error {
	last := len(p.Roots) - 1
	switch step {
	case stepPace:
		p.Number, p.Pace = p.Number+1, pace
		return nil
	case StepActivate:
		p.Phase = Activated
		p.Roots[0], p.Roots[last] = p.Roots[last], p.Roots[0]
	case StepTaint:
		p.Phase = Tainted
	case StepRevoke, StepDiscard:
		p.Phase, p.Roots, p.Emergency = Steady, p.Roots[:1], false
	case StepRollback:
		if p.Phase == Prepared {
			p.Phase, p.Roots = Steady, p.Roots[:1]
			break
		}
		p.Phase, pace = Withdrawn, AtOnce
		p.Roots[0], p.Roots[last] = p.Roots[last], p.Roots[0]
	default:
		return fmt.Errorf("no step is called %q", step)
	}
	p.Number++
	p.Pace, p.Since = pace, now.UTC().Truncate(time.Second)
	return nil
}

// add puts a new root into the plan: the next one, or in an emergency the one
// that signs.
func (p *plan) add(root planRoot, v voucher, emergency bool, pace Pace, now time.Time) {
	if emergency {
		old := p.Roots[:1]
		if p.Phase != Prepared {
			old = append(slices.Clone(p.Roots[1:]), p.Roots[0])
		}
		p.Phase, p.Emergency, p.Roots = Tainted, true, append([]planRoot{root}, old...)
	} else {
		p.Phase, p.Roots = Prepared, append(p.Roots, root)
	}
	p.Vouchers = append(p.Vouchers, v)
	p.Vouchers = p.Vouchers[max(0, len(p.Vouchers)-keepVouchers):]
	p.Number++
	p.Pace, p.Since = pace, now.UTC().Truncate(time.Second)
}

// encode signs the plan by the key of the first of its roots.
func (p *plan) encode(td spiffeid.TrustDomain, key crypto.Signer) ([]byte, error) {
	body, err := p.body()
	if err == nil {
		p.Signature, err = vouch(key, planContext, td, "", body)
	}
	if err != nil {
		return nil, fmt.Errorf("sign the record of the shared roots: %w", err)
	}
	return json.Marshal(p)
}

func (p *plan) body() ([]byte, error) {
	unsigned := *p
	unsigned.Signature = nil
	return json.Marshal(unsigned)
}

// vouched checks that each root of the plan is one of those known, or that the
// one that signs here vouches for it, be it through others; and that the first
// has signed the plan.
func (p *plan) vouched(td spiffeid.TrustDomain, signs *x509.Certificate, others []*x509.Certificate) ([]*x509.Certificate, error) {
	trusted := map[string]*x509.Certificate{RootID(signs): signs}
	for _, v := range p.Vouchers {
		by := trusted[v.By]
		if by == nil {
			continue
		}
		cert, err := x509.ParseCertificate(v.Cert)
		if err != nil || !verifies(by, voucherContext, td, "", v.Cert, v.Signature) {
			continue
		}
		trusted[RootID(cert)] = cert
	}
	for _, o := range others {
		trusted[RootID(o)] = o
	}
	var out []*x509.Certificate
	for _, id := range p.ids() {
		if trusted[id] == nil {
			return nil, daemon.Hint(fmt.Errorf("%w: its root %.16s does not vouch for %.16s", ErrOtherRoot, RootID(signs), id),
				"copy root.crt and root.key of the first issuer, and name their directory in ca.root_dir")
		}
		out = append(out, trusted[id])
	}
	body, err := p.body()
	if err != nil || !verifies(out[0], planContext, td, "", body, p.Signature) {
		return nil, daemon.Hint(errors.New("the record of the shared roots is not signed by its root"), "restore the database from a backup, and find out who wrote to it")
	}
	return out, nil
}

// statement is what a root signs: never the same bytes as a certificate.
func statement(context string, td spiffeid.TrustDomain, name string, what []byte) []byte {
	h := sha256.New()
	for _, part := range [][]byte{[]byte(context), []byte(td.Name()), []byte(name), what} {
		fmt.Fprintf(h, "%d:", len(part))
		h.Write(part)
	}
	return h.Sum(nil)
}

func verifies(by *x509.Certificate, context string, td spiffeid.TrustDomain, name string, what, signature []byte) bool {
	public, ok := by.PublicKey.(*ecdsa.PublicKey)
	return ok && ecdsa.VerifyASN1(public, statement(context, td, name, what), signature)
}

func vouch(key crypto.Signer, context string, td spiffeid.TrustDomain, name string, what []byte) ([]byte, error) {
	if _, ok := key.Public().(*ecdsa.PublicKey); !ok {
		return nil, fmt.Errorf("the key of the root is not an EC key but %T", key.Public())
	}
	return key.Sign(rand.Reader, statement(context, td, name, what), crypto.SHA256)
}

// sign completes a report by the key of the root.
func (r report) sign(key crypto.Signer, td spiffeid.TrustDomain, name string) (report, error) {
	body, err := r.body()
	if err == nil {
		r.Signature, err = vouch(key, reportContext, td, name, body)
	}
	return r, err
}

func (r report) body() ([]byte, error) {
	r.Signature = nil
	return json.Marshal(r)
}

// signedBy says that the report is by an issuer that has the key of a root.
func (r report) signedBy(root *x509.Certificate, td spiffeid.TrustDomain, name string) bool {
	body, err := r.body()
	return err == nil && r.Signs == RootID(root) && verifies(root, reportContext, td, name, body, r.Signature)
}

// seal lets one issuer alone read the key of a root.
func seal(public []byte, td spiffeid.TrustDomain, name, root string, key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, daemon.Hint(errors.New("the key of the root cannot leave where it is kept"), "issuers that share a root keep its key in files: ca.kms")
	}
	to, err := hpke.DHKEM(ecdh.P256()).NewPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("exchange key of issuer %s: %w", name, err)
	}
	return hpke.Seal(to, hpke.HKDFSHA256(), hpke.AES256GCM(), statement(keyContext, td, name, []byte(root)), der)
}

func unseal(mine hpke.PrivateKey, td spiffeid.TrustDomain, name, root string, sealed []byte) (crypto.Signer, error) {
	der, err := hpke.Open(mine, hpke.HKDFSHA256(), hpke.AES256GCM(), statement(keyContext, td, name, []byte(root)), sealed)
	if err != nil {
		return nil, fmt.Errorf("open the sealed key of root %.16s: %w", root, err)
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("the sealed key of root %.16s is no private key", root)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("the sealed key of root %.16s cannot sign", root)
	}
	return signer, nil
}
