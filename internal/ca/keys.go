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
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/softkms"
	"go.step.sm/crypto/pemutil"
	"golang.org/x/sys/unix"

	"sallyport/internal/daemon"
)

const encryptedPEM = "ENCRYPTED PRIVATE KEY"

// keyDir reads the KMS setting: the directory where the private keys are.
func keyDir(dir, kms string) (string, error) {
	scheme, rest, found := strings.Cut(kms, ":")
	switch {
	case kms == "":
		return dir, nil
	case filepath.IsAbs(kms):
		return filepath.Clean(kms), nil
	case found && strings.EqualFold(scheme, softkms.Scheme):
		if rest == "" {
			return dir, nil
		}
		path, _ := strings.CutPrefix(rest, "path=")
		if filepath.IsAbs(path) {
			return filepath.Clean(path), nil
		}
		return "", fmt.Errorf("%q: want softkms:path= and an absolute directory", kms)
	case found && strings.EqualFold(scheme, "file"):
		u, err := url.Parse(kms)
		if err == nil && u.Host == "" && filepath.IsAbs(u.Path) {
			return filepath.Clean(u.Path), nil
		}
		return "", fmt.Errorf("%q: want file:// and an absolute directory", kms)
	case found:
		// The rest of the URI may hold a PIN.
		return "", daemon.Hint(fmt.Errorf("scheme %q is not supported", scheme),
			"use softkms:path=/dir, a file: URI or an absolute directory")
	}
	return "", daemon.Hint(errors.New("the path is not absolute"), "use softkms:path=/dir, a file: URI or an absolute directory")
}

// lockDir makes or checks the directory and keeps others from opening it.
func lockDir(dir string) (*os.File, error) {
	f, err := privateDir(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, daemon.Hint(errors.New("another process has it open"), "stop the other issuer, or give this one a directory of its own")
		}
		return nil, fmt.Errorf("lock directory: %w", err)
	}
	return f, nil
}

func privateDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, daemon.Hint(fmt.Errorf("make directory: %w", err), "name one that this user may write")
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory: %w", err)
	}
	info, err := f.Stat()
	if err == nil {
		err = private(dir, info, "chmod 0700 "+dir)
	}
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is not a directory", dir)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// private refuses what another user could read or own.
func private(path string, info fs.FileInfo, next string) error {
	st, _ := info.Sys().(*syscall.Stat_t)
	if st != nil && int(st.Uid) != os.Geteuid() {
		return daemon.Hint(fmt.Errorf("%s belongs to uid %d, not to uid %d", path, st.Uid, os.Geteuid()), "chown it, or run as that user")
	}
	if info.Mode().Perm()&0o077 != 0 {
		return daemon.Hint(fmt.Errorf("%s has mode %04o, which lets other users in", path, info.Mode().Perm()), next)
	}
	return nil
}

// A keyStore keeps private keys in files of a directory.
type keyStore struct {
	kms        apiv1.KeyManager
	dir        string
	passphrase []byte
	write      func(path string, data []byte, perm fs.FileMode) error
}

func newKeyStore(ctx context.Context, dir string, passphrase []byte) (keyStore, error) {
	m, err := softkms.New(ctx, apiv1.Options{Type: apiv1.SoftKMS})
	if err != nil {
		return keyStore{}, fmt.Errorf("open key store: %w", err)
	}
	return keyStore{kms: m, dir: dir, passphrase: passphrase, write: daemon.WriteFile}, nil
}

func (k keyStore) path(name string) string { return filepath.Join(k.dir, name+".key") }

// save writes a key as PKCS#8, encrypted (PBES2, PBKDF2-SHA-256 with 600,000
// rounds, AES-256-CBC) when there is a passphrase.
func (k keyStore) save(name string, key crypto.PrivateKey) error {
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
func (k keyStore) load(name string) (crypto.Signer, error) {
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

func (k keyStore) parse(path string, data []byte) (crypto.Signer, error) {
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
