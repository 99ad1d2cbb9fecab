package svid

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// diskVersion is raised when an older reader would misunderstand the file.
const diskVersion = 1

type diskState struct {
	Version     int               `json:"version"`
	TrustDomain string            `json:"trust_domain"`
	Bundle      [][]byte          `json:"bundle"`
	Federated   []diskBundle      `json:"federated,omitempty"`
	JWTKeys     map[string][]byte `json:"jwt_keys,omitempty"`
	Identities  []diskIdentity    `json:"identities"`
}

type diskBundle struct {
	TrustDomain string            `json:"trust_domain"`
	Bundle      [][]byte          `json:"bundle"`
	JWTKeys     map[string][]byte `json:"jwt_keys,omitempty"`
}

type diskIdentity struct {
	ID      string   `json:"id"`
	EntryID string   `json:"entry_id"`
	Hint    string   `json:"hint,omitempty"`
	Chain   [][]byte `json:"chain"`
	Key     []byte   `json:"key"` // PKCS #8
	// FederatesWith are names of trust domains.
	FederatesWith []string `json:"federates_with,omitempty"`
}

// Save writes the state to path so that a restart can serve through an outage
// of the issuer. The file holds private keys and has mode 0600; it is replaced
// whole and durable when Save returns.
func (st *State) Save(path string) error {
	d := diskState{Version: diskVersion, TrustDomain: st.Bundle.TrustDomain().Name(), Bundle: ders(st.Bundle.X509Authorities())}
	for td, b := range st.Federated {
		keys, err := keyDERs(st.FederatedJWT[td])
		if err != nil {
			return fmt.Errorf("save identity: keys of %s: %w", td, err)
		}
		d.Federated = append(d.Federated, diskBundle{td.Name(), ders(b.X509Authorities()), keys})
	}
	var err error
	if d.JWTKeys, err = keyDERs(st.JWTKeys); err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	for _, id := range st.Identities {
		key, err := x509.MarshalPKCS8PrivateKey(id.Key)
		if err != nil {
			return fmt.Errorf("save identity %s: %w", id.ID, err)
		}
		i := diskIdentity{ID: id.ID.String(), EntryID: id.EntryID, Hint: id.Hint, Chain: ders(id.Chain), Key: key}
		for _, td := range id.FederatesWith {
			i.FederatesWith = append(i.FederatesWith, td.Name())
		}
		d.Identities = append(d.Identities, i)
	}
	b, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	if err := writeDurable(path, b); err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	return nil
}

func keyDERs(keys map[string]crypto.PublicKey) (map[string][]byte, error) {
	out := make(map[string][]byte, len(keys))
	for kid, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", kid, err)
		}
		out[kid] = der
	}
	return out, nil
}

func parseKeys(in map[string][]byte) (map[string]crypto.PublicKey, error) {
	out := make(map[string]crypto.PublicKey, len(in))
	for kid, der := range in {
		k, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			return nil, fmt.Errorf("JWT key %q: %w", kid, err)
		}
		out[kid] = k
	}
	return out, nil
}

func ders(cs []*x509.Certificate) (out [][]byte) {
	for _, c := range cs {
		out = append(out, c.Raw)
	}
	return out
}

func writeDurable(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".svid-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Load reads what Save wrote. A file that others may read or write is refused,
// as is anything that Source.Set would refuse. Expired identities are left
// out; when none remains the error is ErrExpired. A missing file is
// fs.ErrNotExist.
func Load(path string) (*State, error) {
	st, err := load(path, time.Now())
	if err != nil {
		return nil, fmt.Errorf("load identity from %s: %w", path, err)
	}
	return st, nil
}

// LoadBundle reads the own bundle from what Save wrote, also when every
// identity beside it has expired.
func LoadBundle(path string) (*x509bundle.Bundle, error) {
	st, err := readState(path)
	if err != nil {
		return nil, fmt.Errorf("load bundle from %s: %w", path, err)
	}
	return st.Bundle, nil
}

func readState(path string) (*State, error) {
	b, err := readPrivate(path)
	if err != nil {
		return nil, err
	}
	var d diskState
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return nil, errors.New("file is damaged: remove it and let the proxy attest again") // the cause could quote a key
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("file has text after its end: remove it and let the proxy attest again")
	}
	if d.Version != diskVersion {
		return nil, fmt.Errorf("file has version %d, want %d: remove it and let the proxy attest again", d.Version, diskVersion)
	}
	return d.state()
}

func load(path string, now time.Time) (*State, error) {
	st, err := readState(path)
	if err != nil {
		return nil, err
	}
	had := len(st.Identities)
	st.Identities = slices.DeleteFunc(st.Identities, func(id Identity) bool { return !now.Before(id.Expires()) })
	if had > 0 && len(st.Identities) == 0 {
		return nil, ErrExpired
	}
	return st.prepare(now)
}

func readPrivate(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("file has mode %v: it holds private keys and must be 0600", fi.Mode())
	}
	const limit = 16 << 20 // far above any set of identities
	b, err := io.ReadAll(io.LimitReader(f, limit))
	if err == nil && len(b) == limit {
		err = fs.ErrInvalid
	}
	return b, err
}

func (d *diskState) state() (*State, error) {
	st := &State{Federated: map[spiffeid.TrustDomain]*x509bundle.Bundle{}, FederatedJWT: map[spiffeid.TrustDomain]map[string]crypto.PublicKey{}}
	var err error
	if st.Bundle, err = parseBundle(d.TrustDomain, d.Bundle); err != nil {
		return nil, err
	}
	for _, f := range d.Federated {
		b, err := parseBundle(f.TrustDomain, f.Bundle)
		if err != nil {
			return nil, err
		}
		if st.Federated[b.TrustDomain()] != nil {
			return nil, fmt.Errorf("bundle of %s stands twice", b.TrustDomain())
		}
		st.Federated[b.TrustDomain()] = b
		if st.FederatedJWT[b.TrustDomain()], err = parseKeys(f.JWTKeys); err != nil {
			return nil, fmt.Errorf("bundle of %s: %w", b.TrustDomain(), err)
		}
	}
	if st.JWTKeys, err = parseKeys(d.JWTKeys); err != nil {
		return nil, err
	}
	for _, i := range d.Identities {
		id, err := spiffeid.FromString(i.ID)
		if err != nil {
			return nil, fmt.Errorf("identity: %w", err)
		}
		chain, err := parseCerts(i.Chain)
		if err != nil {
			return nil, fmt.Errorf("identity %s: %w", id, err)
		}
		key, err := x509.ParsePKCS8PrivateKey(i.Key)
		if err != nil {
			return nil, fmt.Errorf("identity %s: private key is damaged", id)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("identity %s: private key cannot sign", id)
		}
		var federates []spiffeid.TrustDomain
		for _, name := range i.FederatesWith {
			td, err := spiffeid.TrustDomainFromString(name)
			if err != nil {
				return nil, fmt.Errorf("identity %s: federates with: %w", id, err)
			}
			federates = append(federates, td)
		}
		st.Identities = append(st.Identities, Identity{ID: id, Chain: chain, Key: signer, Hint: i.Hint, EntryID: i.EntryID, FederatesWith: federates})
	}
	return st, nil
}

func parseBundle(name string, raw [][]byte) (*x509bundle.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	certs, err := parseCerts(raw)
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", td, err)
	}
	return x509bundle.FromX509Authorities(td, certs), nil
}

func parseCerts(raw [][]byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for _, der := range raw {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		out = append(out, c)
	}
	return out, nil
}
