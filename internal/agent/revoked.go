package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// OnRevoked is control.Handler. When it returns no connection is open to whom
// it speaks of. An own SVID among them is replaced, if there still is an entry
// for it.
func (a *Agent) OnRevoked(_ context.Context, list []mesh.RevokedSVID) {
	if !a.held.Revoke(list) {
		return
	}
	a.cfg.Rejudge()
	if a.held.HoldsRevoked() {
		a.rot.Sync()
	}
	a.cfg.Log.Info("SVIDs revoked", "told", len(list), "in_force", len(a.held.Revoked()))
	if err := a.keepRevoked(); err != nil {
		a.cfg.Log.Error("revocations not kept on disk; until the issuer repeats them, a restart forgets them", "err", err)
	}
}

func (a *Agent) keepRevoked() error {
	b, err := json.Marshal(a.held.Revoked())
	if err != nil {
		return err
	}
	return daemon.WriteFile(a.file(revokedFile), b, 0o600)
}

// resumeRevoked takes over the revocations of an earlier run. Without knowing
// them it would believe whom the issuer has told it not to, so a damaged file
// is not passed over.
func (a *Agent) resumeRevoked() error {
	b, err := os.ReadFile(a.file(revokedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var list []mesh.RevokedSVID
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	for _, r := range list {
		err = errors.Join(err, r.Validate())
	}
	if err != nil {
		return daemon.Hint(fmt.Errorf("read %s: %w", a.file(revokedFile), err),
			"remove the file once the issuer can be reached: it tells the revocations again")
	}
	a.held.Revoke(list)
	return nil
}
