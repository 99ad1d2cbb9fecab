package ca

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"go.step.sm/crypto/kms/softkms"
	"golang.org/x/sys/unix"

	"sallyport/internal/daemon"
)

// A keyStore keeps the private keys of the CA, each under the
// name that it has in the state. Safe for concurrent use.
type keyStore interface {
	// create makes an EC P-256 key. The name must be free.
	create(name string) (crypto.Signer, error)
	// adopt takes over a key that was made elsewhere.
	adopt(name string, key crypto.Signer) error
	load(name string) (crypto.Signer, error)
	// has says whether a key of that name is there, usable or not.
	has(name string) (bool, error)
	remove(name string) error
	// where names the place of a key for people.
	where(name string) string
	close() error
}

// openKeys opens the key store that Config.KMS names.
func (c *CA) openKeys(ctx context.Context) (keyStore, error) {
	if isPKCS11(c.cfg.KMS) {
		return openPKCS11(ctx, c.cfg.KMS)
	}
	at, err := keyDir(c.cfg.Dir, c.cfg.KMS)
	if err != nil {
		return nil, err
	}
	if at != c.cfg.Dir {
		d, err := privateDir(at)
		if err != nil {
			return nil, err
		}
		d.Close()
	}
	return newKeyFiles(ctx, at, c.cfg.Passphrase, c.write)
}

// CheckKMS reports a KMS setting that cannot work, before anything is opened.
func (c Config) CheckKMS() error {
	if !isPKCS11(c.KMS) {
		_, err := keyDir(c.Dir, c.KMS)
		return err
	}
	if _, err := parsePKCS11(c.KMS); err != nil {
		return err
	}
	switch {
	case c.RootDir != "":
		return daemon.Hint(errors.New("a root from ca.root_dir cannot go into a PKCS#11 token"), "leave out ca.root_dir, or keep the keys in files")
	case c.SharedRoot:
		return daemon.Hint(errors.New("issuers that share a root hand its key on, which a PKCS#11 token does not"), "keep the keys of issuers on one database in files")
	case len(c.Passphrase) > 0:
		return daemon.Hint(errors.New("a passphrase encrypts key files, and there are none with a PKCS#11 token"), "leave out ca.passphrase_file; the PIN goes into the file that pin-source names")
	}
	return nil
}

const kmsForms = "use softkms:path=/dir, a file: URI, an absolute directory, or pkcs11:module-path=...;token=...?pin-source=..."

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
			kmsForms)
	}
	return "", daemon.Hint(errors.New("the path is not absolute"), kmsForms)
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
