package policyset

import (
	"bytes"
	"crypto/ed25519"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func key(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func pub(n byte) Key { return KeyOf(key(n).Public().(ed25519.PublicKey)) }

func made(t testing.TB, rows string, by ...byte) *Signed {
	t.Helper()
	s, err := New(Set{
		TrustDomain: spiffeid.RequireTrustDomainFromString("corp.example"), Revision: 7, Previous: strings.Repeat("ab", 32),
		Created: time.Date(2026, 11, 27, 6, 0, 0, 0, time.UTC),
		Files:   []File{{"access.csv", []byte(rows)}, {"tests/a.yaml", []byte("end\nsignature x\n")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range by {
		s.Sign(key(n))
	}
	return s
}

func TestCanonical(t *testing.T) {
	s := made(t, "# rows\n", 2, 1)
	b := s.Encode()
	got, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if got.Hash() != s.Hash() || !bytes.Equal(got.Encode(), b) || got.Revision != 7 || string(got.Files[0].Data) != "# rows\n" {
		t.Errorf("read %+v", got)
	}
	if other := made(t, "# rows\n", 1, 2); !bytes.Equal(other.Encode(), b) {
		t.Error("the order of signing changes the bytes")
	}
	if unsigned := made(t, "# rows\n"); unsigned.Hash() != s.Hash() {
		t.Error("signatures change the hash")
	}
}

func TestOnlyCanonicalFormIsRead(t *testing.T) {
	whole := string(made(t, "# rows\n", 1, 2).Encode())
	lines := strings.SplitAfter(whole, "\n")
	swapped := strings.Join(append(append([]string{}, lines[:len(lines)-3]...), lines[len(lines)-2], lines[len(lines)-3]), "")
	for name, text := range map[string]string{
		"nothing":                    "",
		"another version":            strings.Replace(whole, "set v1", "set v2", 1),
		"a word behind the magic":    strings.Replace(whole, "set v1", "set v1 ", 1),
		"a revision with a zero":     strings.Replace(whole, "revision 7", "revision 07", 1),
		"revision 0":                 strings.Replace(whole, "revision 7", "revision 0", 1),
		"a revision beyond counting": strings.Replace(whole, "revision 7", "revision 9007199254740993", 1),
		"a revision that overflows":  strings.Replace(whole, "revision 7", "revision 18446744073709551617", 1),
		"a short previous":           strings.Replace(whole, "previous abab", "previous ab", 1),
		"a previous in upper case":   strings.Replace(whole, "previous abab", "previous ABAB", 1),
		"a time of another zone":     strings.Replace(whole, "06:00:00Z", "07:00:00+01:00", 1),
		"parts of seconds":           strings.Replace(whole, "06:00:00Z", "06:00:00.5Z", 1),
		"a size too large":           strings.Replace(whole, "access.csv 7", "access.csv 99999", 1),
		"a size too small":           strings.Replace(whole, "access.csv 7", "access.csv 6", 1),
		"a negative size":            strings.Replace(whole, "access.csv 7", "access.csv -7", 1),
		"a size with a plus":         strings.Replace(whole, "access.csv 7", "access.csv +7", 1),
		"a file above the folder":    strings.Replace(whole, "access.csv", "../access.csv", 1),
		"a file out of order":        strings.Replace(whole, "access.csv", "zaccess.csv", 1),
		"a file twice":               strings.Replace(whole, "access.csv", "tests/a.yaml", 1),
		"a hidden file":              strings.Replace(whole, "access.csv", ".access.csv", 1),
		"no end":                     strings.Replace(whole, "\n\nend\n", "\n\n", 1),
		"a byte at the end":          whole + "x",
		"a blank line at the end":    whole + "\n",
		"no last line feed":          strings.TrimSuffix(whole, "\n"),
		"carriage returns":           strings.ReplaceAll(whole, "\n", "\r\n"),
		"signatures out of order":    swapped,
		"a signature twice":          whole + lines[len(lines)-2],
	} {
		if text == whole {
			t.Errorf("%s: the case changes nothing", name)
		}
		if _, err := Parse([]byte(text)); err == nil {
			t.Errorf("%s: read without an error", name)
		}
	}
	for n := range len(whole) {
		if s, err := Parse([]byte(whole[:n])); err == nil && len(s.signatures) == 2 {
			t.Fatalf("the first %d bytes are read as the whole", n)
		}
	}
}

func TestSignatures(t *testing.T) {
	two := Signers{Keys: []Key{pub(1), pub(2), pub(3)}, Threshold: 2}
	foreign := made(t, "# rows\n", 1)
	foreign.signatures = append(foreign.signatures, made(t, "# other\n", 2).signatures...)
	twice := made(t, "# rows\n", 1)
	twice.signatures = append(twice.signatures, twice.signatures...)
	for _, tt := range []struct {
		name string
		pins Signers
		set  *Signed
		want string
	}{
		{"two of three", two, made(t, "# rows\n", 1, 3), ""},
		{"all of three", two, made(t, "# rows\n", 1, 2, 3), ""},
		{"a stranger beside two", two, made(t, "# rows\n", 9, 1, 2), ""},
		{"nobody", two, made(t, "# rows\n"), "0 of the 3 pinned keys have signed, 2 must"},
		{"one too few", two, made(t, "# rows\n", 2), "1 of the 3 pinned keys have signed, 2 must"},
		{"the wrong key", two, made(t, "# rows\n", 1, 9), "1 of the 3 pinned keys have signed, 2 must"},
		{"one signed again", two, made(t, "# rows\n", 1, 1), "1 of the 3 pinned keys have signed, 2 must"},
		{"one key twice", two, twice, "1 of the 3 pinned keys have signed, 2 must"},
		{"a signature of another set", two, foreign, "(1 signatures of pinned keys are not of this set), 2 must"},
		{"no threshold means all", Signers{Keys: two.Keys}, made(t, "# rows\n", 1, 2), "2 of the 3 pinned keys have signed, 3 must"},
		{"no pins", Signers{}, made(t, "# rows\n", 1), "no keys are pinned"},
	} {
		err := tt.pins.Verify(tt.set)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// TestAlteredByte changes each byte of a signed file: it is not read, or nobody
// vouches for it.
func TestAlteredByte(t *testing.T) {
	pins := Signers{Keys: []Key{pub(1)}}
	b := made(t, "p, a, in, **, **, *, *, **, -, deny\n", 1).Encode()
	for i := range b {
		for _, flip := range []byte{1, 0x20} {
			c := bytes.Clone(b)
			c[i] ^= flip
			if s, err := Parse(c); err == nil && pins.Verify(s) == nil {
				t.Fatalf("byte %d (%q) altered, and the set is believed", i, b[i])
			}
		}
	}
}

func TestInReach(t *testing.T) {
	for _, tt := range []struct {
		last, revision uint64
		ok             bool
	}{
		{0, 1, true}, {0, MaxRevision / 2, true}, {0, MaxRevision/2 + 1, false}, {0, MaxRevision, false},
		{1, 2, true}, {1, 1 << 32, true}, {1, 1<<32 + 2, false}, {1, MaxRevision, false},
		{MaxRevision / 2, MaxRevision/2 + 1, true}, {9, 3, true},
	} {
		s := Set{Revision: tt.revision}
		if err := s.InReach(tt.last); (err == nil) != tt.ok {
			t.Errorf("revision %d after %d: %v", tt.revision, tt.last, err)
		}
	}
}

func TestPins(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		pins       Signers
	}{
		{"none", "", Signers{}},
		{"one", "", Signers{Keys: []Key{pub(1)}}},
		{"no prefix", "keys[0]", Signers{Keys: []Key{pub(1)[8:]}}},
		{"short", "keys[0]", Signers{Keys: []Key{"ed25519:AAAA"}}},
		{"line feed", "keys[0]", Signers{Keys: []Key{pub(1) + "\n"}}},
		{"twice", "keys[1]: is there twice", Signers{Keys: []Key{pub(1), pub(1)}}},
		{"too high", "threshold: 2 is not from 1 to the 1 keys", Signers{Keys: []Key{pub(1)}, Threshold: 2}},
		{"negative", "threshold: -1", Signers{Keys: []Key{pub(1)}, Threshold: -1}},
		{"without keys", "given without keys", Signers{Threshold: 1}},
	} {
		err := tt.pins.Validate()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestPack(t *testing.T) {
	fsys := fstest.MapFS{
		"tests/b.yaml": {Data: []byte("b")}, "access.csv": {Data: []byte("a")}, "README.md": {}, "embed.go": {},
		".git/config": {}, ".hidden": {},
	}
	files, err := Pack(fsys)
	if err != nil || len(files) != 2 || files[0].Name != "access.csv" || files[1].Name != "tests/b.yaml" {
		t.Errorf("packed %v, %v", files, err)
	}
	fsys["a b.csv"] = &fstest.MapFile{}
	if _, err := Pack(fsys); err == nil || !strings.Contains(err.Error(), `"a b.csv" is no name`) {
		t.Errorf("a name that no set can hold: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(made(f, "# rows\n", 1, 2).Encode())
	f.Add([]byte(magic + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			return
		}
		if !bytes.Equal(s.Encode(), b) {
			t.Fatalf("%q is read and written as %q", b, s.Encode())
		}
	})
}
