// Package policyset is the form in which reviewed policies are pushed: one
// canonical file that holds every policy file with a revision and the hash of
// the set before it, and the Ed25519 signatures of those who answer for it.
//
// It reads and writes that form and counts signatures. What the policies say is
// mesh's; who accepts a set, and in which order, is up to the issuer and to the
// proxies that pin keys.
package policyset

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

const (
	// MaxSize bounds a set with its signatures, bytes: 100,000 rows are less.
	MaxSize = 8 << 20
	// MaxRevision keeps a number that nobody reaches by counting from using up
	// all that could follow.
	MaxRevision = 1 << 53
	// maxJump is how far above the one before a set may be: a few that nobody
	// counted up to leave more numbers than can be used.
	maxJump = 1 << 32
	// maxFiles bounds the files of a set, maxSignatures those who sign it.
	maxFiles      = 1024
	maxSignatures = 64

	magic = "sallyport policy set v1"
	none  = "-"
)

// A Set is a reviewed set with its place in the order of all sets.
type Set struct {
	TrustDomain spiffeid.TrustDomain
	// Revision is greater than that of every set before, from 1.
	Revision uint64
	// Previous is the Hash of the set that was pushed before; empty for the first.
	Previous string
	// Created is in whole seconds, UTC.
	Created time.Time
	// Files are sorted by name.
	Files []File
}

// A File is one policy file, as it was reviewed.
type File struct {
	Name string
	Data []byte
}

// Pack reads the files of a reviewed folder. What nobody takes for a policy is
// left out: hidden files, prose and Go code.
func Pack(fsys fs.FS) ([]File, error) {
	var files []File
	err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name == ".":
			return nil
		case strings.HasPrefix(d.Name(), "."):
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir() || slices.Contains(mesh.Beside, path.Ext(name)):
			return nil
		}
		if !goodName(name) {
			return fmt.Errorf("%q is no name for a policy file: use letters, digits, dots, hyphens and underscores", name)
		}
		info, err := fs.Stat(fsys, name) // of what a link leads to
		if err != nil {
			return err
		}
		if info.Size() > MaxSize {
			return fmt.Errorf("%s has %d bytes, a set holds %d", name, info.Size(), MaxSize)
		}
		b, err := fs.ReadFile(fsys, name)
		files = append(files, File{Name: name, Data: b})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("pack policies: %w", err)
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	return files, nil
}

// nameForm is a file in the folder, or in a folder in it.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$`)

func goodName(name string) bool { return nameForm.MatchString(name) }

var hashForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// IsHash reports whether a text has the form of a Hash.
func IsHash(s string) bool { return hashForm.MatchString(s) }

// Validate reports what keeps a set from being written.
func (s *Set) Validate() error {
	switch {
	case s.TrustDomain.IsZero():
		return errors.New("policy set: trust domain is missing")
	case s.Revision < 1 || s.Revision > MaxRevision:
		return fmt.Errorf("policy set: revision %d is not from 1 to %d", s.Revision, uint64(MaxRevision))
	case s.Previous != "" && !IsHash(s.Previous):
		return fmt.Errorf("policy set: previous %.80q is not the hash of a set: 64 hex digits", s.Previous)
	case s.Created.IsZero():
		return errors.New("policy set: the time it was created is missing")
	case len(s.Files) == 0 || len(s.Files) > maxFiles:
		return fmt.Errorf("policy set: %d files, want 1 to %d", len(s.Files), maxFiles)
	}
	for i, f := range s.Files {
		if !goodName(f.Name) {
			return fmt.Errorf("policy set: %.80q is no name for a policy file", f.Name)
		}
		if i > 0 && s.Files[i-1].Name >= f.Name {
			return fmt.Errorf("policy set: file %s is not in order, or there twice", f.Name)
		}
	}
	return nil
}

// InReach refuses a set whose revision is so far above the last that few more
// such sets would leave no number for those that follow: who took it would take
// nothing lower again. Last is 0 where there was none.
func (s *Set) InReach(last uint64) error {
	top := uint64(MaxRevision / 2)
	if last > 0 {
		top = last + maxJump
	}
	if s.Revision <= top {
		return nil
	}
	return fmt.Errorf("policy set: revision %d is too far above %d: take a number up to %d", s.Revision, last, top)
}

// encode writes the bytes that are hashed and signed.
func (s *Set) encode() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\ntrust_domain %s\nrevision %d\nprevious %s\ncreated %s\n", magic, s.TrustDomain.Name(), s.Revision,
		orNone(s.Previous), s.Created.UTC().Format(time.RFC3339))
	for _, f := range s.Files {
		fmt.Fprintf(&b, "file %s %d\n", f.Name, len(f.Data))
		b.Write(f.Data)
		b.WriteByte('\n')
	}
	b.WriteString("end\n")
	return b.Bytes()
}

func orNone(s string) string {
	if s == "" {
		return none
	}
	return s
}

// FS is the folder of the set, to be parsed.
func (s *Set) FS() fs.FS { return folder(s.Files) }

// Policies parses and checks what the set says. Mistakes are mesh.Errors, with
// file and line.
func (s *Set) Policies() (*mesh.Policies, error) {
	p, err := mesh.ParseFS(s.FS(), s.TrustDomain)
	if err != nil {
		return nil, err
	}
	return p, p.Validate()
}

// Signed is a set with its signatures. Only New and Parse make one.
type Signed struct {
	Set
	body       []byte
	hash       string
	signatures []signature
}

// New writes a set that nobody has signed yet.
func New(s Set) (*Signed, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	body := s.encode()
	if len(body) > MaxSize {
		return nil, fmt.Errorf("policy set: %d bytes are more than %d", len(body), MaxSize)
	}
	return &Signed{Set: s, body: body, hash: hashOf(body)}, nil
}

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Hash is the SHA-256 of the set without its signatures, in hex: what the next
// set names as its previous.
func (s *Signed) Hash() string { return s.hash }

// Encode writes the file: the set and then a line for each signature.
func (s *Signed) Encode() []byte {
	b := bytes.NewBuffer(slices.Clone(s.body))
	for _, g := range s.signatures {
		fmt.Fprintf(b, "signature %s %s\n", g.key, g.text())
	}
	return b.Bytes()
}

// Parse reads what Encode wrote, and nothing else: a set has one form, so that
// its hash cannot mean two things. It checks the form; Signers.Verify checks the
// signatures, and Set.Policies what the files say.
func Parse(b []byte) (*Signed, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("policy set: %d bytes are more than %d", len(b), MaxSize)
	}
	r := &reader{rest: b}
	s := &Signed{Set: r.set()}
	if r.err != nil {
		return nil, r.err
	}
	end := len(b) - len(r.rest)
	s.signatures = r.signatures()
	if r.err != nil {
		return nil, r.err
	}
	if err := s.Validate(); err != nil {
		return nil, err
	}
	s.body = slices.Clone(b[:end])
	if !bytes.Equal(s.encode(), s.body) || !bytes.Equal(s.Encode(), b) {
		return nil, errors.New("policy set: not in canonical form")
	}
	s.hash = hashOf(s.body)
	return s, nil
}

// A reader takes lines off the front; its first error stays.
type reader struct {
	rest []byte
	line int
	err  error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("policy set: line %d: %s", r.line, fmt.Sprintf(format, args...))
	}
}

// maxLine bounds a line of the form; those of files are not read as lines.
const maxLine = 1024

// field takes a line that begins with a word, and returns what follows.
func (r *reader) field(word string) string {
	r.line++
	head, _, ok := bytes.Cut(r.rest[:min(len(r.rest), maxLine)], []byte{'\n'})
	if r.err == nil && !ok {
		r.fail("want %q and the end of the line", word)
	}
	if r.err != nil {
		return ""
	}
	text, ok := strings.CutPrefix(string(head), word)
	if !ok {
		r.fail("want %q, not %.40q", word, head)
		return ""
	}
	r.rest = r.rest[len(head)+1:]
	return text
}

func (r *reader) set() (s Set) {
	if r.field(magic) != "" {
		r.fail("is no %q", magic)
	}
	td := r.field("trust_domain ")
	rev := r.field("revision ")
	prev := r.field("previous ")
	created := r.field("created ")
	if r.err != nil {
		return s
	}
	var err, err2, err3 error
	s.TrustDomain, err = spiffeid.TrustDomainFromString(td)
	s.Revision, err2 = strconv.ParseUint(rev, 10, 64)
	s.Created, err3 = time.Parse(time.RFC3339, created)
	if err = errors.Join(err, err2, err3); err != nil {
		r.fail("head not understood: %v", err)
		return s
	}
	if s.Previous = prev; prev == none {
		s.Previous = ""
	}
	for r.err == nil && bytes.HasPrefix(r.rest, []byte("file ")) {
		if len(s.Files) == maxFiles {
			r.fail("more than %d files", maxFiles)
		}
		s.Files = append(s.Files, r.file())
	}
	if r.field("end") != "" {
		r.fail(`"end" stands alone`)
	}
	return s
}

func (r *reader) file() (f File) {
	name, size, _ := strings.Cut(r.field("file "), " ")
	n, err := strconv.ParseUint(size, 10, 31)
	if err != nil || n >= uint64(len(r.rest)) || r.rest[n] != '\n' {
		r.fail("file %.80q does not have the %.20q bytes that its line says", name, size)
		return f
	}
	f = File{Name: name, Data: slices.Clone(r.rest[:n])}
	r.line += bytes.Count(f.Data, []byte{'\n'}) + 1
	r.rest = r.rest[n+1:]
	return f
}
