package mesh

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
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

var knownFiles = []string{accessFile, guardFile, adminFile, servicesFile, entriesFile, egressFile, tokensFile, modesFile, routesFolder, testsFolder, candidateFolder}

var knownFolders = []string{routesFolder, testsFolder, candidateFolder}

// Beside are extensions of files that may stand beside the reviewed ones: prose,
// and Go code that embeds the folder. Nobody takes them for rows.
var Beside = []string{".md", ".go"}

var errWeakWord = errors.New(`only "allow" is possible`)

// ParseDir reads the reviewed folder dir. Mistakes in its files, all of them,
// are returned as Errors.
func ParseDir(dir string, td spiffeid.TrustDomain) (*Policies, error) {
	f := &Folder{Dir: dir, TrustDomain: td}
	files, err := f.Read()
	if err != nil {
		return nil, err
	}
	return f.Parse(files)
}

// ParseFS is ParseDir for a file system.
func ParseFS(fsys fs.FS, td spiffeid.TrustDomain) (*Policies, error) {
	files, err := readFiles(fsys)
	if err != nil {
		return nil, err
	}
	return (&reader{files: files}).policies(td)
}

// A Folder is a reviewed folder that is read again and again. The entries,
// which may be thousands where the rules are a few, are decoded anew only when
// their file changed. One goroutine at a time may use it.
type Folder struct {
	// Dir is its path, for Read; TrustDomain that of its rows. Required.
	Dir         string
	TrustDomain spiffeid.TrustDomain

	known knownEntries
}

// knownEntries are the entries of a file without a mistake.
type knownEntries struct {
	sum     [sha256.Size]byte
	entries []Entry
}

// Read reads the bytes of the folder as they are now.
func (f *Folder) Read() (*Files, error) {
	st, err := os.Stat(f.Dir)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("read policies: %s is not a folder", f.Dir)
	}
	return readFiles(os.DirFS(f.Dir))
}

// ParseFS is ParseFS of another folder with the same entries, most likely.
func (f *Folder) ParseFS(fsys fs.FS) (*Policies, error) {
	files, err := readFiles(fsys)
	if err != nil {
		return nil, err
	}
	return f.Parse(files)
}

// Parse is ParseDir of what was read.
func (f *Folder) Parse(files *Files) (*Policies, error) {
	return (&reader{files: files, known: &f.known}).policies(f.TrustDomain)
}

// policies reads everything.
func (r *reader) policies(td spiffeid.TrustDomain) (*Policies, error) {
	if td.IsZero() {
		return nil, errors.New("read policies: trust domain is missing")
	}
	r.src, r.spoiled = sources{}, map[Origin]map[string]bool{}
	p := &Policies{TrustDomain: td}
	r.checkNames()
	r.rows(p, accessFile, false)
	r.rows(p, guardFile, true)
	r.admin(p)
	r.documents(p)
	r.candidateFiles(p)
	v := validator{p: p, valuesOnly: len(r.errs) > 0, spoiled: r.spoiled}
	r.errs = append(r.errs, v.run()...)
	if len(r.errs) > 0 {
		return nil, r.sorted()
	}
	return p, nil
}

// A reader makes policies of the files of one folder and keeps their lines.
type reader struct {
	files *Files
	src   sources
	errs  Errors
	// spoiled is collected from the decoder of each file.
	spoiled map[Origin]map[string]bool
	// known keeps the entries; nil keeps none.
	known *knownEntries
}

// read returns a file, nil when it does not exist.
func (r *reader) read(name string) []byte {
	b := r.files.bytes[name]
	if b != nil && len(b) <= maxRead {
		r.src[name] = splitLines(b)
	}
	return b
}

// checkNames refuses a file that nothing would read: most likely its name is a
// slip, and its rows would silently not be in force.
func (r *reader) checkNames() {
	for _, e := range r.files.folders["."] {
		name := e.Name()
		if aside(name) {
			continue
		}
		if !slices.Contains(knownFiles, name) {
			r.errs = append(r.errs, &Problem{File: name, Msg: "unexpected file in the policy folder" + didYouMean(name, knownFiles)})
		} else if e.IsDir() != slices.Contains(knownFolders, name) {
			r.errs = append(r.errs, &Problem{File: name, Msg: "routes, tests and candidate are folders, everything else a file"})
		}
	}
	if r.files.bytes[accessFile] == nil {
		r.errs = append(r.errs, &Problem{File: accessFile, Msg: "file is missing: without rows every call is denied, and an empty file says so on purpose"})
	}
}

func (r *reader) rows(p *Policies, name string, guard bool) {
	rules, members, errs := parseRows(name, r.read(name), guard)
	p.Rules = append(p.Rules, rules...)
	p.Memberships = append(p.Memberships, members...)
	r.errs = append(r.errs, errs...)
}

// admin reads the rows for operators, if there are any.
func (r *reader) admin(p *Policies) {
	rules, errs := parseAdmin(r.read(adminFile))
	p.Admin = rules
	r.errs = append(r.errs, errs...)
}

func (r *reader) documents(p *Policies) {
	var (
		services servicesDoc
		egress   egressDoc
		tokens   tokensDoc
		modes    modesDoc
	)
	r.yaml(servicesFile, &services)
	r.entries(p)
	r.yaml(egressFile, &egress)
	r.yaml(tokensFile, &tokens)
	r.yaml(modesFile, &modes)
	p.Services, p.Destinations = services.nouns(), egress.nouns()
	p.Tokens, p.Modes = tokens.noun(), modes.nouns()
	r.routes(p)
	lenient := len(r.errs) > 0
	for _, e := range r.files.folders[testsFolder] {
		name := path.Join(testsFolder, e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if e.IsDir() || path.Ext(name) != testExtension {
			r.errs = append(r.errs, &Problem{File: name, Msg: "unexpected file: tests are *.yaml"})
			continue
		}
		var doc testsDoc
		r.yaml(name, &doc)
		p.Cases = append(p.Cases, doc.nouns(p.Services, lenient, &r.errs)...)
	}
}

// yaml decodes a file if it exists.
func (r *reader) yaml(name string, v any) {
	if b := r.read(name); b != nil {
		r.decode(&decoder{file: name, limit: MaxFile}, b, v)
	}
}

// decode reports whether there is no mistake.
func (r *reader) decode(d *decoder, b []byte, v any) bool {
	d.decode(b, reflect.ValueOf(v).Elem())
	r.errs = append(r.errs, d.problems...)
	maps.Copy(r.spoiled, d.spoiled)
	return len(d.problems) == 0
}

// entries reads the entries, or takes those that are known of the same bytes.
func (r *reader) entries(p *Policies) {
	var doc entriesDoc
	b := r.read(entriesFile)
	if b == nil {
		p.Entries = doc.nouns()
		return
	}
	sum := sha256.Sum256(b)
	if r.known != nil && r.known.entries != nil && r.known.sum == sum {
		p.Entries = slices.Clone(r.known.entries)
		return
	}
	good := r.decode(&decoder{file: entriesFile, limit: maxEntries}, b, &doc)
	p.Entries = doc.nouns()
	if r.known != nil && good {
		*r.known = knownEntries{sum, slices.Clone(p.Entries)}
	}
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
