package mesh

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

// seedFiles adds every test file of a kind to the corpus.
func seedFiles(f *testing.F, patterns ...string) {
	f.Helper()
	for _, pattern := range patterns {
		names, err := filepath.Glob(pattern)
		if err != nil || len(names) == 0 {
			f.Fatalf("%s: %d files, %v", pattern, len(names), err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
}

// FuzzRows: whatever the file holds, it is either refused or gives rows that
// compile, and reading is repeatable.
func FuzzRows(f *testing.F) {
	seedFiles(f, "testdata/good/*/access.csv", "testdata/bad/access-*.csv")
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParseFS(fstest.MapFS{accessFile: {Data: b}}, demoDomain)
		if err != nil {
			if _, ok := errors.AsType[Errors](err); !ok {
				t.Fatalf("refused without a place: %v", err)
			}
			return
		}
		s, err := Compile(p, 1, 1, nil)
		if err != nil {
			t.Fatalf("parsed but does not compile: %v", err)
		}
		for _, r := range s.Rules {
			if r.Effect != Allow && r.Effect != Deny {
				t.Errorf("effect %q", r.Effect)
			}
			for _, field := range []string{r.ID, r.Src, r.Dst, r.Port, r.Verb, r.Path, r.Cond} {
				if field == "" || strings.ContainsAny(field, ",\"\r\n#") || strings.TrimSpace(field) != field {
					t.Errorf("field %q", field)
				}
			}
		}
		back, err := DecodeSnapshot(s.Encode())
		if err != nil || back.ContentHash() != s.ContentHash() {
			t.Errorf("snapshot does not survive: %v", err)
		}
	})
}

// FuzzDocuments: no YAML text makes a decoder panic or hang, and every refusal
// names its file.
func FuzzDocuments(f *testing.F) {
	seedFiles(f, "testdata/good/full/*.yaml", "testdata/good/full/tests/*.yaml", "testdata/bad/*.yaml")
	f.Add([]byte("a: *b\n--- \n? [x\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []any{new(servicesDoc), new(entriesDoc), new(egressDoc), new(testsDoc), new(sampleConfig)} {
			err := DecodeYAML("f.yaml", b, v)
			if err == nil {
				continue
			}
			errs, ok := errors.AsType[Errors](err)
			if !ok || len(errs) == 0 || !strings.HasPrefix(err.Error(), "f.yaml") {
				t.Fatalf("refused without a place: %v", err)
			}
		}
		m := fstest.MapFS{accessFile: {}, servicesFile: {Data: b}, entriesFile: {Data: b}, egressFile: {Data: b}, "tests/a.yaml": {Data: b}}
		if p, err := ParseFS(m, demoDomain); err == nil {
			if _, err := Compile(p, 1, 1, nil); err != nil {
				t.Errorf("parsed but does not compile: %v", err)
			}
			if q, err := DecodePolicies(p.Encode()); err != nil || q.Hash() != p.Hash() {
				t.Errorf("policies do not survive: %v", err)
			}
		}
	})
}

// FuzzSnapshot: what is accepted is canonical, and validating and projecting it
// never panics. Projecting it again changes nothing.
func FuzzSnapshot(f *testing.F) {
	f.Add(demoSnapshot(f).Encode())
	f.Add((&Snapshot{}).Encode())
	f.Add(demoSnapshot(f).ProjectGateway().Encode())
	f.Add((&Snapshot{Tokens: &Tokens{Issuers: []TokenIssuer{{Issuer: "https://ci.example", Profile: ProfileJWT}}, APIKeys: []APIKey{{Name: "a", Rate: Rate{Calls: 1, Per: time.Second}}}}}).Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := DecodeSnapshot(b)
		if err != nil {
			return
		}
		if string(s.Encode()) != string(b) {
			t.Error("accepted what is not canonical")
		}
		good := s.Validate() == nil
		for _, v := range s.Services {
			own := s.Project(v.ID)
			if good && own.Project(v.ID).ContentHash() != own.ContentHash() {
				t.Errorf("the projection for %s, projected again, is another one", v.ID)
			}
		}
		s.ProjectGateway()
	})
}

// FuzzCond: what is accepted has a word of the closed list.
func FuzzCond(f *testing.F) {
	f.Add("iss=https://ci.example scope~deploy claim.ref=refs/heads/main acr>=2 bound")
	f.Add("when=Mon-Fri/08:00-18:00 until=2027-01-31T18:00:00Z unless.src=spiffe://td/** env.sni=same")
	f.Fuzz(func(t *testing.T, s string) {
		conds, err := ParseCond(s)
		if err != nil {
			return
		}
		for _, c := range conds {
			known := false
			for _, w := range condWords {
				known = known || w == c.Word
			}
			if !known || c.Word != CondBound && c.Value == "" {
				t.Errorf("%q gave %+v", s, c)
			}
		}
	})
}
