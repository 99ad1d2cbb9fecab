package mesh

import (
	"cmp"
	"errors"
	"fmt"
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
	st, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("read policies: %s is not a folder", dir)
	}
	return ParseFS(os.DirFS(dir), td)
}

// ParseFS is ParseDir for a file system.
func ParseFS(fsys fs.FS, td spiffeid.TrustDomain) (*Policies, error) {
	if td.IsZero() {
		return nil, errors.New("read policies: trust domain is missing")
	}
	r := &reader{fsys: fsys, src: sources{}, spoiled: map[Origin]map[string]bool{}}
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
}

// read returns a file, nil when it does not exist.
func (r *reader) read(name string) ([]byte, error) {
	f, err := r.fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
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
		entries  entriesDoc
		egress   egressDoc
		tokens   tokensDoc
		modes    modesDoc
	)
	err := errors.Join(r.yaml(servicesFile, &services), r.yaml(entriesFile, &entries), r.yaml(egressFile, &egress), r.yaml(tokensFile, &tokens), r.yaml(modesFile, &modes))
	if err != nil {
		return err
	}
	p.Services, p.Entries, p.Destinations = services.nouns(), entries.nouns(), egress.nouns()
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
	d := &decoder{file: name, limit: MaxFile}
	if name == entriesFile {
		d.limit = maxEntries
	}
	d.decode(b, reflect.ValueOf(v).Elem())
	r.errs = append(r.errs, d.problems...)
	maps.Copy(r.spoiled, d.spoiled)
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
