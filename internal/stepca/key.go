package stepca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"go.step.sm/crypto/jose"

	"sallyport/internal/daemon"
)

// tokenLife is how long a token is good: clocks may differ by some of it.
const tokenLife = 2 * time.Minute

// A Key is the private key of a JWK provisioner. The zero Key signs nothing.
type Key struct {
	id     string
	signer crypto.Signer
	method jwt.SigningMethod
}

// LoadKey reads a private JWK as "step crypto jwk create" writes it, encrypted
// or plain. The file must be closed to other users.
func LoadKey(path string, password []byte) (Key, error) {
	data, err := private(path)
	if err != nil {
		return Key{}, err
	}
	var opts []jose.Option
	if password != nil {
		opts = append(opts, jose.WithPassword(password))
	}
	// The cause is left out: the library may quote what it decoded.
	k, err := jose.ParseKey(data, opts...)
	switch {
	case err != nil && password == nil:
		return Key{}, daemon.Hint(fmt.Errorf("%s is no private JWK, or is encrypted", path), "name the file with its password in ca.upstream.password_file")
	case err != nil:
		return Key{}, daemon.Hint(fmt.Errorf("%s does not open: the password is wrong or the file is damaged", path), "check ca.upstream.password_file")
	}
	id := k.KeyID
	if id == "" {
		sum, err := k.Thumbprint(crypto.SHA256)
		if err != nil {
			return Key{}, fmt.Errorf("%s: name the key: %w", path, err)
		}
		id = base64.RawURLEncoding.EncodeToString(sum)
	}
	signer, ok := k.Key.(crypto.Signer)
	if !ok {
		return Key{}, daemon.Hint(fmt.Errorf("%s is not a private key", path), "name the private half of the provisioner's key")
	}
	out := Key{id: id, signer: signer}
	switch key := signer.(type) {
	case *ecdsa.PrivateKey:
		switch key.Curve {
		case elliptic.P256():
			out.method = jwt.SigningMethodES256
		case elliptic.P384():
			out.method = jwt.SigningMethodES384
		}
	case ed25519.PrivateKey:
		out.method = jwt.SigningMethodEdDSA
	case *rsa.PrivateKey:
		out.method = jwt.SigningMethodRS256
	}
	if out.method == nil {
		return Key{}, fmt.Errorf("%s is a key of type %T, want EC P-256 or P-384, Ed25519 or RSA", path, signer)
	}
	return out, nil
}

// private reads a file that only its owner may read.
func private(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a file", path)
	case info.Mode().Perm()&0o077 != 0:
		return nil, daemon.Hint(fmt.Errorf("%s may be read by others (mode %04o)", path, info.Mode().Perm()), "chmod 600 "+path)
	}
	const most = 64 << 10
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && len(data) > most {
		err = fmt.Errorf("%s is larger than a key", path)
	}
	return data, err
}

// token is good for one signature, of this CSR.
func (c *Client) token(csr *x509.CertificateRequest, root *x509.Certificate) (string, error) {
	if csr == nil || csr.Subject.CommonName == "" {
		return "", errors.New("the request has no CSR with a name")
	}
	sans := make([]string, 0, len(csr.URIs))
	for _, u := range csr.URIs {
		sans = append(sans, u.String())
	}
	var id [32]byte
	rand.Read(id[:]) // never fails
	now := c.cfg.Now()
	rootSum, csrSum := sha256.Sum256(root.Raw), sha256.Sum256(csr.Raw)
	t := jwt.NewWithClaims(c.cfg.Key.method, jwt.MapClaims{
		"iss": c.cfg.Provisioner, "sub": csr.Subject.CommonName, "aud": c.base + "/1.0/sign",
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(tokenLife).Unix(), "jti": hex.EncodeToString(id[:]),
		"sans": sans, "sha": hex.EncodeToString(rootSum[:]),
		"cnf": map[string]string{"x5rt#S256": base64.RawURLEncoding.EncodeToString(csrSum[:])},
	})
	t.Header["kid"] = c.cfg.Key.id
	text, err := t.SignedString(c.cfg.Key.signer)
	if err != nil {
		return "", fmt.Errorf("sign the token for step-ca: %w", err)
	}
	return text, nil
}
