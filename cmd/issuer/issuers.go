package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/registry"
	"sallyport/internal/store"
)

// nameForm is what the file issuer.id holds.
var nameForm = regexp.MustCompile(`^[0-9a-f]{16}$`)

// openStore opens the database that is configured.
func (in *issuer) openStore(ctx context.Context) error {
	if in.cfg.Database.URL == "" {
		s, err := store.OpenSQLite(ctx, filepath.Join(in.cfg.DataDir, "issuer.db"))
		if err == nil {
			in.store = s
		}
		return err
	}
	var err error
	if in.name, err = issuerName(filepath.Join(in.cfg.DataDir, "issuer.id")); err != nil {
		return err
	}
	in.instance = in.name + "-" + randomName()
	s, err := store.PostgresConfig{URL: in.cfg.Database.URL}.Open(ctx)
	if err != nil {
		return daemon.Hint(err, "mend that, or leave out database.url for SQLite in data_dir")
	}
	in.store = s
	return nil
}

// issuerName reads the name of this issuer, and makes it at the first start.
func issuerName(file string) (string, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		name := randomName()
		return name, daemon.WriteFile(file, []byte(name+"\n"), 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("read the name of the issuer: %w", err)
	}
	name := strings.TrimSpace(string(data))
	if !nameForm.MatchString(name) {
		return "", daemon.Hint(fmt.Errorf("%s is damaged", file), "remove it: the issuer takes another name")
	}
	return name, nil
}

func randomName() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// joinIssuers makes sure that this issuer signs under the root of the others,
// and that they know its JWT keys before it signs with them.
func (in *issuer) joinIssuers(ctx context.Context) error {
	if in.instance == "" {
		return nil
	}
	plan, err := in.registry.RootPlan(ctx)
	if err == nil && plan == nil {
		err = in.registry.CheckRoot(ctx, in.ca.Bundle().X509[0].Raw)
	}
	if err == nil {
		err = in.ca.Join(ctx, in.name, in.registry)
	}
	if err == nil {
		err = in.writeBundle() // the roots may have been replaced meanwhile
	}
	if err != nil {
		return err
	}
	return in.registry.PublishKeys(ctx, in.name, in.ownKeys())
}

func (in *issuer) ownKeys() []registry.Key {
	var out []registry.Key
	for _, k := range in.ca.Bundle().JWT {
		out = append(out, registry.Key{KeyID: k.KeyID, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt})
	}
	return out
}

// publishKeys tells the other issuers of new JWT keys. The next key is told
// long before its first use, so that a failure may wait for the next change.
func (in *issuer) publishKeys(ctx context.Context) {
	if in.instance == "" {
		return
	}
	if err := in.registry.PublishKeys(ctx, in.name, in.ownKeys()); err != nil {
		in.log.Error("JWT keys not known to the other issuers", "err", err)
	}
}

// followIssuers lets the proxies fetch what another issuer changed, and keys of
// issuers below this one.
func (in *issuer) followIssuers(ctx context.Context) error {
	revision, known := in.registry.Status().PolicyRevision, in.registry.Keys()
	for {
		changed, keys := in.registry.Changed(), in.registry.KeysChanged()
		now, have := in.registry.Status().PolicyRevision, in.registry.Keys()
		if now != revision { // by another issuer, or at the end of a rollout
			in.metrics.PolicyRevision().Set(float64(now))
		}
		if now != revision && in.instance != "" {
			in.ready.Set("policy", nil)
			in.server.SyncNow()
		} else if !slices.EqualFunc(known, have, func(a, b registry.Key) bool { return a.KeyID == b.KeyID }) {
			in.server.SyncNow()
		}
		revision, known = now, have
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-keys:
		}
	}
}

// seenFile keeps the hash of the policy folder as it was last put in force. The
// name goes with the form of the hash: one of an older form is not there.
func (in *issuer) seenFile() string { return filepath.Join(in.cfg.DataDir, "policies.taken") }

// sawFolder says that the policy folder is no edit. Issuers that share a
// database have a folder each, and one that starts, or whose folder is updated
// last, must not put an old set in force again: only a folder that changed
// since this issuer last took it counts.
func (in *issuer) sawFolder(p *mesh.Policies) bool {
	st := in.registry.Status()
	if in.instance == "" || st.PolicyRevision == 0 {
		return false
	}
	hash := p.Hash()
	seen, err := os.ReadFile(in.seenFile())
	switch {
	case err == nil && strings.TrimSpace(string(seen)) == hash:
		return true
	case !errors.Is(err, fs.ErrNotExist):
		return false
	}
	if st.PolicyHash != hash {
		in.log.Warn("the policy folder differs from what the other issuers have in force, which stays; an edit of the folder puts it in force", "hash", hash, "in_force", st.PolicyHash)
	}
	in.rememberFolder(hash)
	return true
}

func (in *issuer) rememberFolder(hash string) {
	if in.instance == "" {
		return
	}
	if err := daemon.WriteFile(in.seenFile(), []byte(hash+"\n"), 0o600); err != nil {
		in.log.Error("the policy folder will count as edited at the next start", "err", err)
	}
}
