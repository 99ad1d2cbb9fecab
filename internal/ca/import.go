package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"sallyport/internal/daemon"
)

// importRoot takes over the root that another issuer made, and stores it with
// its key as if it were made here.
func (c *CA) importRoot(ctx context.Context, name string, now time.Time) (*x509.Certificate, crypto.Signer, error) {
	fail := func(err error) (*x509.Certificate, crypto.Signer, error) {
		return nil, nil, fmt.Errorf("take over the root in %s: %w", c.cfg.RootDir, err)
	}
	next := "copy root.crt and root.key there from the directory ca of the first issuer"
	info, err := os.Stat(c.cfg.RootDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fail(daemon.Hint(errors.New("there is no such directory"), next))
	case err != nil:
		return fail(err)
	case !info.IsDir():
		return fail(daemon.Hint(errors.New("it is not a directory"), next))
	}
	if err := private("root_dir", info, "chmod 0700 "+c.cfg.RootDir); err != nil {
		return fail(err)
	}
	from := &CA{cfg: c.cfg}
	from.cfg.Dir = c.cfg.RootDir
	if from.keys, err = newKeyFiles(ctx, c.cfg.RootDir, c.cfg.Passphrase, nil); err != nil {
		return fail(err)
	}
	root, key, err := from.pair(rootName, 1)
	switch {
	case err != nil:
		return fail(err)
	case root.CheckSignatureFrom(root) != nil:
		return fail(errors.New("the root certificate is not signed by its own key"))
	case now.Before(root.NotBefore) || !now.Before(root.NotAfter):
		return fail(fmt.Errorf("the root is valid from %s to %s and the clock says %s", utc(root.NotBefore), utc(root.NotAfter), utc(now)))
	}
	if err := c.keys.adopt(name, key); err != nil {
		return fail(err)
	}
	if err := c.saveCert(name, root); err != nil {
		return fail(err)
	}
	return root, key, nil
}
