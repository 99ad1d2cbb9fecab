package store

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestCopySQLite copies a store that is open and being written.
func TestCopySQLite(t *testing.T) {
	dir := t.TempDir()
	path, to := filepath.Join(dir, "issuer.db"), filepath.Join(dir, "copy.db")
	s, err := OpenSQLite(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	put := func(n int) {
		t.Helper()
		if _, err := s.Write(t.Context(), Op{Kind: KindEntry, Key: fmt.Sprint(n), Value: []byte("v")}); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 100 {
		put(n)
	}
	if err := CopySQLite(t.Context(), path, to); err != nil {
		t.Fatal(err)
	}
	put(100)
	if st, err := os.Stat(to); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the copy: %v, %v", st.Mode(), err)
	}
	c, err := OpenSQLite(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Get(t.Context(), KindEntry, "99"); err != nil {
		t.Error(err)
	}
	if _, err := c.Get(t.Context(), KindEntry, "100"); err == nil {
		t.Error("the copy has what was written after it")
	}
	if err := CopySQLite(t.Context(), path, to); err == nil {
		t.Error("a copy replaces a file")
	}
	if err := CopySQLite(t.Context(), filepath.Join(dir, "none.db"), filepath.Join(dir, "x.db")); err == nil {
		t.Error("what is not there is copied")
	}
}
