package conform

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Domain is a throw-away trust domain. The implementation under test is told
// to federate with it, so that what it signs counts there until it is looked
// at. It is worth nothing to anybody, and whoever trusts it outside of a check
// has made a mistake: its keys lie on disk.
type Domain struct {
	td   spiffeid.TrustDomain
	root *x509.Certificate
	key  *ecdsa.PrivateKey
	// jwt are the keys by kid. Those of kidWIT and kidNone stand in the bundle
	// document, but not as keys of JWT-SVIDs.
	jwt map[string]crypto.Signer
}

// The key IDs of a Domain.
const (
	kidES256 = "conform-es256"
	kidES384 = "conform-es384"
	kidRSA   = "conform-rsa"
	kidWIT   = "conform-wit"  // use wit-svid
	kidNone  = "conform-none" // without use
)

const (
	keyFile = "domain.json"
	// BundleFile is what an operator has the implementation federate with.
	BundleFile = "bundle.json"
)

// NewDomain makes a trust domain, valid for 30 days.
func NewDomain(td spiffeid.TrustDomain) (*Domain, error) {
	d, err := quickDomain(td)
	if err != nil {
		return nil, err
	}
	d.jwt[kidRSA], err = rsa.GenerateKey(rand.Reader, 2048)
	return d, err
}

// quickDomain makes one without an RSA key, which takes its time.
func quickDomain(td spiffeid.TrustDomain) (*Domain, error) {
	d := &Domain{td: td, jwt: map[string]crypto.Signer{}}
	var err error
	if d.key, err = newKey(); err != nil {
		return nil, err
	}
	for kid, c := range map[string]elliptic.Curve{kidES256: elliptic.P256(), kidES384: elliptic.P384(), kidWIT: elliptic.P256(), kidNone: elliptic.P256()} {
		if d.jwt[kid], err = ecdsa.GenerateKey(c, rand.Reader); err != nil {
			return nil, err
		}
	}
	d.root, err = d.sign(d.authority("root"), nil, d.key.Public(), d.key)
	return d, err
}

// TrustDomain is that of the domain.
func (d *Domain) TrustDomain() spiffeid.TrustDomain { return d.td }

// kept is a Domain on disk.
type kept struct {
	TrustDomain spiffeid.TrustDomain `json:"trust_domain"`
	Root        []byte               `json:"root"`
	Key         []byte               `json:"key"`
	JWT         map[string][]byte    `json:"jwt"`
}

// Save writes the keys, which nobody else may read, and the bundle document
// into dir, and makes dir when it is not there. It replaces nothing.
func (d *Domain) Save(dir string) error {
	k := kept{TrustDomain: d.td, Root: d.root.Raw, JWT: map[string][]byte{}}
	var err error
	if k.Key, err = x509.MarshalPKCS8PrivateKey(d.key); err != nil {
		return err
	}
	for kid, key := range d.jwt {
		if k.JWT[kid], err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			return err
		}
	}
	b, err := json.Marshal(k)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, b := range map[string][]byte{keyFile: b, BundleFile: d.document(nil)} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// LoadDomain reads what Save wrote.
func LoadDomain(dir string) (*Domain, error) {
	b, err := os.ReadFile(filepath.Join(dir, keyFile))
	if err != nil {
		return nil, err
	}
	var k kept
	if err := json.Unmarshal(b, &k); err != nil {
		return nil, fmt.Errorf("%s: not a trust domain of this check: %w", filepath.Join(dir, keyFile), err)
	}
	d := &Domain{td: k.TrustDomain, jwt: map[string]crypto.Signer{}}
	bad := fmt.Errorf("%s: not a trust domain of this check", filepath.Join(dir, keyFile))
	if d.root, err = x509.ParseCertificate(k.Root); err != nil {
		return nil, bad
	}
	signer := func(der []byte) crypto.Signer {
		key, _ := x509.ParsePKCS8PrivateKey(der)
		s, _ := key.(crypto.Signer)
		return s
	}
	var ok bool
	if d.key, ok = signer(k.Key).(*ecdsa.PrivateKey); !ok {
		return nil, bad
	}
	for _, kid := range []string{kidES256, kidES384, kidRSA, kidWIT, kidNone} {
		if d.jwt[kid] = signer(k.JWT[kid]); d.jwt[kid] == nil {
			return nil, bad
		}
	}
	return d, nil
}

// id is an identity in the domain.
func (d *Domain) id(path string) string { return d.td.IDString() + path }

func (d *Domain) authority(name string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: d.td.Name() + " " + name}, URIs: []*url.URL{d.td.ID().URL()},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

// leaf is the template of an X.509-SVID that is right. The name stands in an
// extension of our own making, so that it can be any text.
func (d *Domain) leaf(ids ...string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Organization: []string{"conform"}},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour), ExtraExtensions: []pkix.Extension{uriNames(true, ids...)},
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// sign signs tpl; without parent, as its own.
func (d *Domain) sign(tpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	if parent == nil {
		parent = tpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // never fails
	b[0] = b[0]&0x3f | 0x40
	return new(big.Int).SetBytes(b[:])
}

// uriNames is a subject alternative name with URIs as they are given.
func uriNames(critical bool, uris ...string) pkix.Extension {
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	der, _ := asn1.Marshal(names) // raw values always encode
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: critical, Value: der}
}

// document is the bundle document of the domain; change edits it.
func (d *Domain) document(change func(map[string]any)) []byte {
	x := jwk(d.root.PublicKey)
	x["use"], x["x5c"] = "x509-svid", []any{base64.StdEncoding.EncodeToString(d.root.Raw)}
	keys := []any{x}
	for _, kid := range slices.Sorted(maps.Keys(d.jwt)) {
		k := jwk(d.jwt[kid].Public())
		k["kid"], k["use"] = kid, "jwt-svid"
		switch kid {
		case kidWIT:
			k["use"] = "wit-svid"
		case kidNone:
			delete(k, "use")
		}
		keys = append(keys, k)
	}
	doc := map[string]any{"keys": keys, "spiffe_sequence": 1, "spiffe_refresh_hint": 60}
	if change != nil {
		change(doc)
	}
	b, _ := json.Marshal(doc) // maps of strings and numbers
	return b
}

// jwk is RFC 7518 sections 6.2.1 and 6.3.1.
func jwk(key crypto.PublicKey) map[string]any {
	b64 := base64.RawURLEncoding.EncodeToString
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		raw, _ := k.Bytes() // 4, X, Y; our curves have this form
		half := (len(raw) - 1) / 2
		return map[string]any{"kty": "EC", "crv": k.Params().Name, "x": b64(raw[1 : 1+half]), "y": b64(raw[1+half:])}
	case *rsa.PublicKey:
		return map[string]any{"kty": "RSA", "n": b64(k.N.Bytes()), "e": b64(big.NewInt(int64(k.E)).Bytes())}
	}
	return map[string]any{}
}
