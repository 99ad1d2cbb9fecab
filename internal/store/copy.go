package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// CopySQLite writes the database in the file at path, as it is at one moment,
// into a new file of mode 0600. A process may have it open.
func CopySQLite(ctx context.Context, path, to string) (err error) {
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("copy store: %w", err)
	}
	// Made here, so that it never exists with another mode.
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("copy store: %s is there already", to)
	}
	if err != nil {
		return fmt.Errorf("copy store: %w", err)
	}
	defer func() {
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			os.Remove(to)
		}
	}()
	s := &SQLite{path: path}
	db, err := s.connect(1, "busy_timeout(5000)")
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.ExecContext(ctx, `VACUUM INTO ?`, to); err != nil {
		return s.explain("copy", err)
	}
	return nil
}
