package mesh

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Files of the reviewed folder. Only accessFile must exist.
const (
	accessFile    = "access.csv"
	guardFile     = "guardrails.csv"
	servicesFile  = "services.yaml"
	entriesFile   = "entries.yaml"
	egressFile    = "egress.yaml"
	testsFolder   = "tests"
	testExtension = ".yaml"
)

var knownFiles = []string{accessFile, guardFile, adminFile, servicesFile, entriesFile, egressFile, tokensFile, modesFile, testsFolder, candidateFolder}

// Beside are extensions of files that may stand beside the reviewed ones: prose,
// and Go code that embeds the folder. Nobody takes them for rows.
var Beside = []string{".md", ".go"}

var errWeakWord = errors.New(`only "allow" is possible`)

// ParseDir reads the reviewed folder dir. Mistakes in its files, all of them,
// are returned as Errors.
func ParseDir(dir string, td spiffeid.TrustDomain) (*Policies, error) {
	p, _, err := (&Folder{Dir: dir, TrustDomain: td}).Parse()
	return p, err
}

// ParseFS is ParseDir for a file system.
func ParseFS(fsys fs.FS, td spiffeid.TrustDomain) (*Policies, error) {
	return (&reader{fsys: fsys, sum: sha256.New()}).policies(td)
}

// A Folder is a reviewed folder that is read again and again. The entries,
// which may be thousands where the rules are a few, are decoded anew only when
// their file changed. One goroutine at a time may use it.
type Folder struct {
	// Dir is its path, TrustDomain that of its rows. Required.
	Dir         string
	TrustDomain spiffeid.TrustDomain

	known knownEntries
}

// knownEntries are the entries of a file without a mistake.
type knownEntries struct {
	sum     [sha256.Size]byte
	entries []Entry
}

// A Sum is the SHA-256 of the names and bytes that were read.
type Sum [sha256.Size]byte

// Parse is ParseDir. Two results with one Sum come from the same bytes.
func (f *Folder) Parse() (*Policies, Sum, error) {
	st, err := os.Stat(f.Dir)
	if err != nil {
		return nil, Sum{}, fmt.Errorf("read policies: %w", err)
	}
	if !st.IsDir() {
		return nil, Sum{}, fmt.Errorf("read policies: %s is not a folder", f.Dir)
	}
	r := &reader{fsys: os.DirFS(f.Dir), sum: sha256.New(), known: &f.known}
	p, err := r.policies(f.TrustDomain)
	return p, Sum(r.sum.Sum(nil)), err
}

// policies reads everything.
func (r *reader) policies(td spiffeid.TrustDomain) (*Policies, error) {
	if td.IsZero() {
		return nil, errors.New("read policies: trust domain is missing")
	}
	r.src, r.spoiled = sources{}, map[Origin]map[string]bool{}
	p := &Policies{TrustDomain: td}
	if err := r.checkNames(); err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	err := errors.Join(r.rows(p, accessFile, false), r.rows(p, guardFile, true), r.admin(p), r.documents(p), r.candidateFiles(p))
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	v := validator{p: p, valuesOnly: len(r.errs) > 0, spoiled: r.spoiled}
	r.errs = append(r.errs, v.run()...)
	if len(r.errs) > 0 {
		return nil, r.sorted()
	}
	return p, nil
}

// A reader reads the files of one folder and keeps their lines.
type reader struct {
	fsys fs.FS
	src  sources
	errs Errors
	// spoiled is collected from the decoder of each file.
	spoiled map[Origin]map[string]bool
	// cases is true when there is a folder of tests, candidate when there is
	// one of a candidate.
	cases, candidate bool
	// sum takes what is read, known keeps the entries; nil keeps none.
	sum   hash.Hash
	known *knownEntries
}

// read returns a file, nil when it does not exist.
func (r *reader) read(name string) ([]byte, error) {
	f, err := r.fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(r.sum, "none %q\n", name)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, max(maxRows, maxEntries)+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if b == nil {
		b = []byte{}
	}
	fmt.Fprintf(r.sum, "file %q %d\n", name, len(b))
	r.sum.Write(b)
	if len(b) <= max(maxRows, maxEntries) {
		r.src[name] = splitLines(b)
	}
	return b, nil
}

// checkNames refuses a file that nothing would read: most likely its name is a
// slip, and its rows would silently not be in force.
func (r *reader) checkNames() error {
	entries, err := fs.ReadDir(r.fsys, ".")
	if err != nil {
		return err
	}
	found := false
	for _, e := range entries {
		name := e.Name()
		fmt.Fprintf(r.sum, "name %q %t\n", name, e.IsDir())
		if strings.HasPrefix(name, ".") || slices.Contains(Beside, path.Ext(name)) {
			continue
		}
		found = found || name == accessFile
		if !slices.Contains(knownFiles, name) {
			r.errs = append(r.errs, &Problem{File: name, Msg: "unexpected file in the policy folder" + didYouMean(name, knownFiles)})
		} else if e.IsDir() != (name == testsFolder || name == candidateFolder) {
			r.errs = append(r.errs, &Problem{File: name, Msg: "tests and candidate are folders, everything else a file"})
		} else if e.IsDir() {
			r.cases, r.candidate = r.cases || name == testsFolder, r.candidate || name == candidateFolder
		}
	}
	if !found {
		r.errs = append(r.errs, &Problem{File: accessFile, Msg: "file is missing: without rows every call is denied, and an empty file says so on purpose"})
	}
	return nil
}

func (r *reader) rows(p *Policies, name string, guard bool) error {
	b, err := r.read(name)
	if err != nil {
		return err
	}
	rules, members, errs := parseRows(name, b, guard)
	p.Rules = append(p.Rules, rules...)
	p.Memberships = append(p.Memberships, members...)
	r.errs = append(r.errs, errs...)
	return nil
}

// admin reads the rows for operators, if there are any.
func (r *reader) admin(p *Policies) error {
	b, err := r.read(adminFile)
	if err != nil {
		return err
	}
	rules, errs := parseAdmin(b)
	p.Admin = rules
	r.errs = append(r.errs, errs...)
	return nil
}

func (r *reader) documents(p *Policies) error {
	var (
		services servicesDoc
		egress   egressDoc
		tokens   tokensDoc
		modes    modesDoc
	)
	err := errors.Join(r.yaml(servicesFile, &services), r.entries(p), r.yaml(egressFile, &egress), r.yaml(tokensFile, &tokens), r.yaml(modesFile, &modes))
	if err != nil {
		return err
	}
	p.Services, p.Destinations = services.nouns(), egress.nouns()
	p.Tokens, p.Modes = tokens.noun(), modes.nouns()
	if !r.cases {
		return nil
	}
	lenient := len(r.errs) > 0
	names, err := fs.ReadDir(r.fsys, testsFolder)
	if err != nil {
		return err
	}
	for _, e := range names {
		name := path.Join(testsFolder, e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if e.IsDir() || path.Ext(name) != testExtension {
			r.errs = append(r.errs, &Problem{File: name, Msg: "unexpected file: tests are *.yaml"})
			continue
		}
		var doc testsDoc
		if err := r.yaml(name, &doc); err != nil {
			return err
		}
		p.Cases = append(p.Cases, doc.nouns(p.Services, lenient, &r.errs)...)
	}
	return nil
}

// yaml decodes a file if it exists; mistakes in it are kept, not returned.
func (r *reader) yaml(name string, v any) error {
	b, err := r.read(name)
	if err != nil || b == nil {
		return err
	}
	r.decode(&decoder{file: name, limit: MaxFile}, b, v)
	return nil
}

// decode reports whether there is no mistake.
func (r *reader) decode(d *decoder, b []byte, v any) bool {
	d.decode(b, reflect.ValueOf(v).Elem())
	r.errs = append(r.errs, d.problems...)
	maps.Copy(r.spoiled, d.spoiled)
	return len(d.problems) == 0
}

// entries reads the entries, or takes those that are known of the same bytes.
func (r *reader) entries(p *Policies) error {
	b, err := r.read(entriesFile)
	if err != nil {
		return err
	}
	var doc entriesDoc
	if b == nil {
		p.Entries = doc.nouns()
		return nil
	}
	sum := sha256.Sum256(b)
	if r.known != nil && r.known.entries != nil && r.known.sum == sum {
		p.Entries = slices.Clone(r.known.entries)
		return nil
	}
	good := r.decode(&decoder{file: entriesFile, limit: maxEntries}, b, &doc)
	p.Entries = doc.nouns()
	if r.known != nil && good {
		*r.known = knownEntries{sum, slices.Clone(p.Entries)}
	}
	return nil
}

// sorted places every mistake and puts them in the order of files and lines.
func (r *reader) sorted() Errors {
	for _, p := range r.errs {
		r.src.place(p)
	}
	slices.SortStableFunc(r.errs, func(a, b *Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
	return r.errs
}
