package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// received keeps the audit lines of the proxies as they came, one file each.
// A line may come twice: each has its number and the hash of the one before.
type received struct {
	dir string

	mu    sync.Mutex // guards files
	files map[spiffeid.ID]*os.File
}

func openReceived(dir string) (*received, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("keep received audit records: %w", err)
	}
	return &received{dir: dir, files: map[spiffeid.ID]*os.File{}}, nil
}

// Receive appends the lines; they are on the disk when it returns.
func (r *received) Receive(_ context.Context, proxy spiffeid.ID, lines [][]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	f, err := r.file(proxy)
	if err != nil {
		return err
	}
	var b []byte
	for _, l := range lines {
		b = append(append(b, l...), '\n')
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

// file returns the open file of a proxy. mu is held.
func (r *received) file(proxy spiffeid.ID) (*os.File, error) {
	if f := r.files[proxy]; f != nil {
		return f, nil
	}
	// SPIFFE path segments hold no '~', so that two identities never share a
	// name.
	name := strings.ReplaceAll(strings.TrimPrefix(proxy.Path(), "/"), "/", "~") + ".jsonl"
	f, err := os.OpenFile(filepath.Join(r.dir, name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	r.files[proxy] = f
	return f, nil
}

// Close closes every file.
func (r *received) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, f := range r.files {
		errs = append(errs, f.Close())
	}
	r.files = nil
	return errors.Join(errs...)
}
