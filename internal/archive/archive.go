// Package archive keeps joined records of calls and of what a shadow answered,
// for auditors and for nobody else.
//
// Records are redacted, compressed and encrypted with age to the auditors' keys
// before anything of them touches the disk: whoever writes an archive cannot
// read it. It is written in segments; each, once it is closed, has a line in a
// chain of hashes whose head is signed. Add works in the caller's goroutine and
// drops, counted, what cannot be kept. Run closes segments whose time has come,
// removes what is too old, and hands copies to the one place where else they go.
package archive

import (
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"filippo.io/age"

	"sallyport/internal/telemetry"
)

// Settings are what an operator says of an archive.
type Settings struct {
	// Recipients are the public keys of the auditors, as age-keygen prints them
	// (age1...). One at least; nobody else can read the archive.
	Recipients []string `yaml:"recipients"`
	// Dir is the folder, of the archive's own. Default: archives/NAME in the
	// data directory.
	Dir string `yaml:"dir"`
	// RotateBytes and RotateAfter close a segment: once it has so many bytes, or
	// is so old. Defaults 64 MiB and 5 min.
	RotateBytes int64         `yaml:"rotate_bytes"`
	RotateAfter time.Duration `yaml:"rotate_after"`
	// KeepFor and KeepBytes bound what is kept here; the oldest segments go
	// first, those that still wait for the upload not at all: then new records
	// are dropped. Defaults 30 days and 10 GiB.
	KeepFor   time.Duration `yaml:"keep_for"`
	KeepBytes int64         `yaml:"keep_bytes"`
	// Redact is what must not be in it.
	Redact RedactConfig `yaml:"redact"`
}

var goodName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,31}$`)

// CheckName says whether an archive may have the name.
func CheckName(name string) error {
	if !goodName.MatchString(name) {
		return fmt.Errorf("%.40q is not 1 to 32 of a-z, 0-9, '-' and '_'", name)
	}
	return nil
}

// Validate reports every mistake by field name.
func (s Settings) Validate() error {
	var errs []error
	if len(s.Recipients) == 0 {
		errs = append(errs, errors.New("recipients: missing; write the public key of an auditor, as age-keygen prints it"))
	}
	for i, r := range s.Recipients {
		if _, err := age.ParseX25519Recipient(r); err != nil {
			errs = append(errs, fmt.Errorf("recipients[%d]: %.80q is no public key of age; write one that begins with age1", i, r))
		}
	}
	for name, n := range map[string]int64{"rotate_bytes": s.RotateBytes, "rotate_after": int64(s.RotateAfter), "keep_for": int64(s.KeepFor), "keep_bytes": s.KeepBytes} {
		if n < 0 {
			errs = append(errs, fmt.Errorf("%s: is negative", name))
		}
	}
	var list interface{ Unwrap() []error }
	if err := s.Redact.Validate(); errors.As(err, &list) {
		for _, e := range list.Unwrap() {
			errs = append(errs, fmt.Errorf("redact.%w", e))
		}
	}
	return errors.Join(errs...)
}

// Config is what an Archive needs.
type Config struct {
	Settings
	// Name of the archive. Required.
	Name string
	// Origin names the signed head; Key is the text by which others verify it,
	// and Sign signs. Required.
	Origin, Key string
	Sign        func(Head) ([]byte, error)
	// Sealed records a segment elsewhere before its head is signed. Optional.
	Sealed func(Link) error
	// Upload puts a file of the archive into another place; what is there under
	// the name is replaced. It is tried again until it succeeds. Optional.
	Upload func(ctx context.Context, name string, r io.Reader, size int64) error
	// Metrics counts records. Optional.
	Metrics *telemetry.Registry
	// Log is for operators. Required.
	Log *slog.Logger
}

// An Archive takes records.
type Archive struct {
	cfg        Config
	recipients []age.Recipient
	redact     *Redactor
	kept       *telemetry.Counter
	dropped    *telemetry.Counter
	// changed wakes Run: a segment was closed.
	changed chan struct{}

	mu      sync.Mutex // guards the fields below
	chain   chain
	open    *segment
	restTil time.Time // when a disk that failed is tried again
	full    bool      // what must not be removed fills KeepBytes
	closed  bool
}

// A segment is being written.
type segment struct {
	link  Link
	file  *os.File
	sum   hash.Hash
	bytes int64
	age   io.WriteCloser
	zip   *gzip.Writer
}

// Write counts and hashes what goes to the file.
func (s *segment) Write(b []byte) (int, error) {
	n, err := s.file.Write(b)
	s.sum.Write(b[:n])
	s.bytes += int64(n)
	return n, err
}

// Open continues the archive of a folder, or begins one. A segment that was
// being written when a process ended becomes one that is cut.
func Open(cfg Config) (*Archive, error) {
	errs := []error{CheckName(cfg.Name), cfg.Validate()}
	for name, missing := range map[string]bool{"dir": cfg.Dir == "", "origin": cfg.Origin == "", "key": cfg.Key == "", "sign": cfg.Sign == nil, "log": cfg.Log == nil} {
		if missing {
			errs = append(errs, errors.New(name+": missing"))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("archive %s: %w", cfg.Name, err)
	}
	cfg.RotateBytes, cfg.RotateAfter = cmp.Or(cfg.RotateBytes, 64<<20), cmp.Or(cfg.RotateAfter, 5*time.Minute)
	cfg.KeepBytes, cfg.KeepFor = cmp.Or(cfg.KeepBytes, 10<<30), cmp.Or(cfg.KeepFor, 30*24*time.Hour)
	a := &Archive{
		cfg: cfg, redact: NewRedactor(cfg.Redact), changed: make(chan struct{}, 1),
		kept: cfg.Metrics.ArchiveRecords(cfg.Name, "kept"), dropped: cfg.Metrics.ArchiveRecords(cfg.Name, "dropped"),
	}
	for _, r := range cfg.Recipients {
		x, err := age.ParseX25519Recipient(r)
		if err != nil {
			return nil, err // Validate has seen it
		}
		a.recipients = append(a.recipients, x)
	}
	if err := a.resume(); err != nil {
		return nil, fmt.Errorf("archive %s: %w", cfg.Name, err)
	}
	return a, nil
}

// resume finds what an earlier process has left.
func (a *Archive) resume() (err error) {
	if err := os.MkdirAll(a.cfg.Dir, 0o700); err != nil {
		return err
	}
	if a.chain, err = loadChain(a.cfg.Dir); err != nil {
		return fmt.Errorf("%w; move %s away to begin another archive", err, a.cfg.Dir)
	}
	if err := replaceFile(a.path(keyFile), []byte(a.cfg.Key+"\n")); err != nil {
		return err
	}
	for _, l := range a.chain.links { // of a process that said so and ended
		for _, f := range l.Removed {
			if err := os.Remove(a.path(f)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return errors.Join(a.adopt(), a.sign())
}

// adopt makes a segment of what was being written when something went wrong.
func (a *Archive) adopt() error {
	left := a.path(openFile)
	sum, size, err := hashFile(left)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case size == 0:
		return os.Remove(left)
	}
	if n := len(a.chain.links); n > 0 && a.chain.links[n-1].SHA256 == sum { // only the name is missing
		return os.Rename(left, a.path(a.chain.links[n-1].File))
	}
	st, err := os.Stat(left)
	if err != nil {
		return err
	}
	return a.link(Link{SHA256: sum, Bytes: size, Cut: true, Last: st.ModTime().UTC(), Recipients: a.cfg.Recipients})
}

func (a *Archive) path(name string) string { return filepath.Join(a.cfg.Dir, name) }

// Add keeps a record, which it redacts, or drops it.
func (a *Archive) Add(r *Record) {
	a.redact.Record(r)
	line, err := json.Marshal(r)
	if err == nil {
		err = a.write(r.Time, append(line, '\n'))
	}
	if err == nil {
		a.kept.Inc()
		return
	}
	a.dropped.Inc()
	if !errors.Is(err, errResting) {
		a.cfg.Log.Warn("a record of a copied call was dropped", "archive", a.cfg.Name, "err", err)
	}
}

// errResting is the reason while a full or broken disk is left alone.
var errResting = errors.New("the archive takes nothing now")

// restFor is how long a disk that failed is left alone.
const restFor = 5 * time.Second

func (a *Archive) write(at time.Time, line []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed || a.full || time.Now().Before(a.restTil) {
		return errResting
	}
	err := a.append(at, line)
	if err != nil {
		a.restTil = time.Now().Add(restFor)
		return errors.Join(err, a.seal(true))
	}
	if a.open.bytes >= a.cfg.RotateBytes {
		if err := a.seal(false); err != nil {
			a.cfg.Log.Error("a segment of the archive cannot be closed", "archive", a.cfg.Name, "err", err)
		}
	}
	return nil
}

// append writes a line into the open segment. The caller holds the lock.
func (a *Archive) append(at time.Time, line []byte) error {
	if a.open == nil {
		if err := a.begin(); err != nil {
			return err
		}
	}
	s := a.open
	if _, err := s.zip.Write(line); err != nil {
		return err
	}
	s.link.Records++
	if s.link.First.IsZero() || at.Before(s.link.First) {
		s.link.First = at
	}
	if at.After(s.link.Last) {
		s.link.Last = at
	}
	return nil
}

// begin opens a segment. The caller holds the lock.
func (a *Archive) begin() error {
	if err := a.adopt(); err != nil {
		return err
	}
	f, err := os.OpenFile(a.path(openFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	s := &segment{file: f, sum: sha256.New(), link: Link{Time: time.Now().UTC(), Recipients: a.cfg.Recipients}}
	if s.age, err = age.Encrypt(s, a.recipients...); err != nil {
		return errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	s.zip = gzip.NewWriter(s.age)
	a.open = s
	return nil
}

// seal closes the open segment, if there is one. Cut says that writing to it
// has failed. The caller holds the lock.
func (a *Archive) seal(cut bool) error {
	s := a.open
	if s == nil {
		return nil
	}
	a.open = nil
	err := errors.Join(s.zip.Close(), s.age.Close(), s.file.Sync())
	if cerr := s.file.Close(); cerr != nil || err != nil {
		cut = true
	}
	s.link.SHA256, s.link.Bytes, s.link.Cut = hex.EncodeToString(s.sum.Sum(nil)), s.bytes, cut
	if cut {
		// What a full disk has taken of the last write is not known.
		if s.link.SHA256, s.link.Bytes, err = hashFile(a.path(openFile)); err != nil {
			return err
		}
	}
	return a.link(s.link)
}

// link makes the file that was written the next segment: first the line, then
// the name, then the record elsewhere and the head. The caller holds the lock.
func (a *Archive) link(l Link) error {
	l.Time = time.Now().UTC()
	l.File = fmt.Sprintf("%08d-%.12s.age", len(a.chain.links)+1, l.SHA256)
	if err := a.appendLink(l); err != nil {
		return err
	}
	if err := os.Rename(a.path(openFile), a.path(l.File)); err != nil {
		return err
	}
	select {
	case a.changed <- struct{}{}:
	default:
	}
	return a.sign()
}

// appendLink writes a line of the chain.
func (a *Archive) appendLink(l Link) error {
	line, err := a.chain.next(&l)
	if err != nil {
		return err
	}
	if a.cfg.Sealed != nil {
		if err := a.cfg.Sealed(l); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(a.path(chainFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil {
		_, err = f.Write(line)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return errors.Join(err, f.Truncate(st.Size()), f.Close()) // half a line would end the chain
	}
	a.chain.took(l, line)
	return f.Close()
}

// sign signs the end of the chain. The caller holds the lock.
func (a *Archive) sign() error {
	signed, err := a.cfg.Sign(a.chain.head(a.cfg.Origin))
	if err != nil {
		return err
	}
	return replaceFile(a.path(headFile), signed)
}

// Close closes the open segment; what is added later is dropped.
func (a *Archive) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	return a.seal(false)
}
