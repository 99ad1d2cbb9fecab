package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/softkms"
	"go.step.sm/crypto/pemutil"

	"sallyport/internal/daemon"
)

const encryptedPEM = "ENCRYPTED PRIVATE KEY"

// keyFiles keeps private keys in files of a directory.
type keyFiles struct {
	kms        apiv1.KeyManager
	dir        string
	passphrase []byte
	write      func(path string, data []byte, perm fs.FileMode) error
}

func newKeyFiles(ctx context.Context, dir string, passphrase []byte, write func(string, []byte, fs.FileMode) error) (*keyFiles, error) {
	m, err := softkms.New(ctx, apiv1.Options{Type: apiv1.SoftKMS})
	if err != nil {
		return nil, fmt.Errorf("open key store: %w", err)
	}
	return &keyFiles{kms: m, dir: dir, passphrase: passphrase, write: write}, nil
}

func (k *keyFiles) path(name string) string { return filepath.Join(k.dir, name+".key") }

func (k *keyFiles) where(name string) string { return "private key " + k.path(name) }

func (k *keyFiles) create(name string) (crypto.Signer, error) {
	made, err := k.kms.CreateKey(&apiv1.CreateKeyRequest{SignatureAlgorithm: apiv1.ECDSAWithSHA256})
	if err != nil {
		return nil, fmt.Errorf("make key %s: %w", name, err)
	}
	signer, err := k.kms.CreateSigner(&made.CreateSignerRequest)
	if err != nil {
		return nil, fmt.Errorf("make key %s: %w", name, err)
	}
	return signer, k.save(name, made.PrivateKey)
}

func (k *keyFiles) adopt(name string, key crypto.Signer) error { return k.save(name, key) }

func (k *keyFiles) has(name string) (bool, error) {
	_, err := os.Lstat(k.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (k *keyFiles) remove(name string) error { return os.Remove(k.path(name)) }

func (k *keyFiles) close() error { return k.kms.Close() }

// save writes a key as PKCS#8, encrypted (PBES2, PBKDF2-SHA-256 with 600,000
// rounds, AES-256-CBC) when there is a passphrase.
func (k *keyFiles) save(name string, key crypto.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode key %s: %w", name, err)
	}
	block := &pem.Block{Type: "PRIVATE KEY", Bytes: der}
	if len(k.passphrase) > 0 {
		if block, err = pemutil.EncryptPKCS8PrivateKey(rand.Reader, der, k.passphrase, x509.PEMCipherAES256); err != nil {
			return fmt.Errorf("encrypt key %s: %w", name, err)
		}
	}
	return k.write(k.path(name), pem.EncodeToMemory(block), 0o600)
}

// load reads a key and checks that nobody else could.
func (k *keyFiles) load(name string) (crypto.Signer, error) {
	path := k.path(name)
	f, err := os.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, daemon.Hint(fmt.Errorf("private key %s is missing", path), "restore it from a backup")
	case errors.Is(err, fs.ErrPermission):
		return nil, daemon.Hint(fmt.Errorf("private key %s is not readable by uid %d", path, os.Geteuid()), "chown it, or run as its owner")
	case err != nil:
		return nil, fmt.Errorf("read private key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read private key: %w", err)
	}
	if err := private("private key "+path, info, "chmod 0600 it, and treat the key as known to others if they were there"); err != nil {
		return nil, err
	}
	const most = 64 << 10
	if !info.Mode().IsRegular() || info.Size() > most {
		return nil, daemon.Hint(fmt.Errorf("private key %s is not a key file", path), "restore it from a backup")
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return nil, fmt.Errorf("read private key %s: %w", path, err)
	}
	return k.parse(path, data)
}

func (k *keyFiles) parse(path string, data []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(data)
	switch {
	case block == nil || block.Type != "PRIVATE KEY" && block.Type != encryptedPEM:
		return nil, daemon.Hint(fmt.Errorf("private key %s is damaged: no PKCS#8 PEM block", path), "restore it from a backup")
	case block.Type == encryptedPEM && len(k.passphrase) == 0:
		return nil, daemon.Hint(fmt.Errorf("private key %s is encrypted and no passphrase is set", path), "set the passphrase of the CA")
	case block.Type != encryptedPEM && len(k.passphrase) > 0:
		return nil, daemon.Hint(fmt.Errorf("private key %s is not encrypted although a passphrase is set", path),
			"encrypt it with openssl pkcs8 -topk8 -v2 aes256, or unset the passphrase")
	}
	req := &apiv1.CreateSignerRequest{SigningKeyPEM: data}
	if block.Type == encryptedPEM {
		req.Password = k.passphrase
	}
	signer, err := k.kms.CreateSigner(req)
	if err != nil {
		// The cause is left out: the library may quote what it decoded.
		if block.Type == encryptedPEM {
			return nil, daemon.Hint(fmt.Errorf("private key %s does not open: the passphrase is wrong or the file is damaged", path),
				"set the passphrase it was written with")
		}
		return nil, daemon.Hint(fmt.Errorf("private key %s is damaged", path), "restore it from a backup")
	}
	return signer, nil
}
