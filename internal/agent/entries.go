package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// resumeEntries takes over the entries of an earlier run: without them no
// local process is the workload, however valid its SVID. They outlive their
// withdrawal no longer than that SVID does.
func (a *Agent) resumeEntries() error {
	b, err := os.ReadFile(a.file(entriesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var es []mesh.Entry
	if err == nil {
		err = json.Unmarshal(b, &es)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", a.file(entriesFile), err)
	}
	a.entries.Store(&es)
	return nil
}

// keepEntries makes what was fetched the entries in force, and keeps them on
// disk when they are others.
func (a *Agent) keepEntries(es []mesh.Entry) {
	old, _ := json.Marshal(a.Entries()) // entries have no value that JSON lacks
	a.entries.Store(&es)
	now, err := json.Marshal(es)
	if err == nil && bytes.Equal(old, now) {
		return
	}
	if err == nil {
		err = daemon.WriteFile(a.file(entriesFile), now, 0o600)
	}
	if err != nil {
		a.cfg.Log.Error("entries not kept on disk", "err", err)
	}
}
