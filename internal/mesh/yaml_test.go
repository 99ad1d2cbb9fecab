package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

type sampleConfig struct {
	Address netip.AddrPort       `yaml:"address"`
	Domain  spiffeid.TrustDomain `yaml:"trust_domain"`
	ID      *spiffeid.ID         `yaml:"id"`
	Wait    time.Duration        `yaml:"wait"`
	Secret  string               `yaml:"secret" secret:"true"`
	Tune    sampleTune           `yaml:"tune"`
	Common  sampleCommon         `yaml:",inline"`
	Routes  map[ServiceName]int  `yaml:"routes"`
	Names   []string             `yaml:"names"`
	On      bool
	Share   float64 `yaml:"share"`
	Hidden  string  `yaml:"-"`
}

type sampleTune struct {
	Small int8   `yaml:"small"`
	Big   uint64 `yaml:"big"`
}

type sampleCommon struct {
	Log string `yaml:"log"`
}

func TestDecodeYAMLReadsEveryKind(t *testing.T) {
	got := sampleConfig{Wait: time.Minute, Hidden: "kept", Names: []string{"default"}}
	err := DecodeYAML("c.yaml", []byte(`
# a comment
address: "127.0.0.1:8443"
trust_domain: demo.sallyport
id: spiffe://demo.sallyport/x
tune: {small: -5, big: 18446744073709551615}
log: |
  two
  lines
routes:
  web: 1
  "billing": 2
names: [a, "b"]
on: true
share: 0.5
`), &got)
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromString("spiffe://demo.sallyport/x")
	want := sampleConfig{
		Address: netip.MustParseAddrPort("127.0.0.1:8443"), Domain: demoDomain, ID: &id,
		Wait: time.Minute, Hidden: "kept", Tune: sampleTune{-5, 1<<64 - 1},
		Common: sampleCommon{"two\nlines\n"}, Routes: map[ServiceName]int{"web": 1, "billing": 2},
		Names: []string{"a", "b"}, On: true, Share: 0.5,
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(sampleConfig{}, spiffeid.ID{}, spiffeid.TrustDomain{}), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDecodeYAMLOfNothingKeepsDefaults(t *testing.T) {
	for _, src := range []string{"", "\n", "# only a comment\n", "---\n"} {
		got := sampleConfig{Wait: time.Second}
		if err := DecodeYAML("c.yaml", []byte(src), &got); err != nil || got.Wait != time.Second {
			t.Errorf("%q: %v, %v", src, err, got.Wait)
		}
	}
}

func TestDecodeYAMLReportsAllMistakesAtOnce(t *testing.T) {
	var got sampleConfig
	err := DecodeYAML("c.yaml", []byte(`adress: x
wait: 5
tune:
  small: 300
  bgi: 1
routes: {web: one}
names: [1, [a]]
on: yes
share: much
trust_domain: Not A Domain
private: x
hidden: x
`), &got)
	errs, ok := errors.AsType[Errors](err)
	if !ok {
		t.Fatalf("got %v", err)
	}
	var places []string
	for _, p := range errs {
		first, _, _ := strings.Cut(p.Error(), "\n")
		places = append(places, first)
	}
	want := []string{
		`c.yaml:1:1: unknown field "adress": did you mean "address"?`,
		`c.yaml:2:7: wait: "5" is not a duration: write a number with a unit, such as 5s or 10m`,
		`c.yaml:4:10: tune.small: "300" is not a whole number of at most 8 bits`,
		`c.yaml:5:3: unknown field "bgi": did you mean "big"?`,
		`c.yaml:6:15: routes.web is text, want a whole number`,
		`c.yaml:7:9: names[0] is a number, want text: put it in quotes`,
		`c.yaml:7:12: names[1] is a list, want text`,
		`c.yaml:8:5: on is text, want true or false`,
		`c.yaml:9:8: share is text, want a number`,
		`c.yaml:10:15: trust_domain: "Not A Domain": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores`,
		`c.yaml:11:1: unknown field "private"; known are address, id, log, names, on, routes, secret, share, trust_domain, tune, wait`,
		`c.yaml:12:1: unknown field "hidden"; known are address, id, log, names, on, routes, secret, share, trust_domain, tune, wait`,
	}
	if diff := cmp.Diff(want, places); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDecodeYAMLNeverShowsASecret(t *testing.T) {
	for _, src := range []string{
		"secret: 4711", "secret: {a: hunter4711}", "secret: [hunter4711]", "secret: &a hunter4711",
		"secret: \"hunter4711", "sceret: hunter4711", "Secret: hunter4711", "secret: a\nsecret: hunter4711",
		"secret: |\n  hunter1\n  hunter4711\x00\n", "on: true\nsecret:\n  - a\n  - 4711\n", "{on: yes, secret: hunter4711}",
		"secret: a\n hunter4711: b\n",
	} {
		var got sampleConfig
		err := DecodeYAML("c.yaml", []byte(src), &got)
		if err == nil || strings.Contains(err.Error(), "4711") {
			t.Errorf("%s: %v", src, err)
		}
	}
}

func TestDecodeYAMLShowsLinesBesideASecret(t *testing.T) {
	var got sampleConfig
	err := DecodeYAML("c.yaml", []byte("secret: hunter4711\non: yes\n"), &got)
	if err == nil || !strings.Contains(err.Error(), "\n    on: yes\n") {
		t.Errorf("got %v", err)
	}
}

func TestDecodeYAMLRefusesBombs(t *testing.T) {
	for name, src := range map[string]string{
		"flow nesting":     "names: " + strings.Repeat("[", 50_000),
		"map nesting":      "names: " + strings.Repeat("{a: ", 25_000),
		"entries nesting":  "names:\n  " + strings.Repeat("- ", 50_000) + "x",
		"question nesting": strings.Repeat("? ", 50_000),
		"colon nesting":    strings.Repeat("a: ", 25_000),
		"aliases":          "names: &a [x]\nroutes: {web: *a}",
		"size":             "log: " + strings.Repeat("x", MaxFile),
		"block nesting":    indented(1000),
		"many keys":        strings.Join(keys(20_000), "\n"),
		"many flow keys":   "routes: {" + strings.Join(keys(20_000), ",\n ") + "}",
	} {
		t.Run(name, func(t *testing.T) {
			var got sampleConfig
			if err := DecodeYAML("c.yaml", []byte(src), &got); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func keys(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("k%d: 1", i)
	}
	return out
}

// indented nests maps in block form.
func indented(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	return b.String()
}

func TestDecodeYAMLNeedsAPointerToAStruct(t *testing.T) {
	var n int
	for _, v := range []any{nil, n, &n, sampleConfig{}, (*sampleConfig)(nil)} {
		if err := DecodeYAML("c.yaml", []byte("a: 1"), v); err == nil {
			t.Errorf("%T was accepted", v)
		}
	}
}

func TestProblemShowsWhereALongLineIsWrong(t *testing.T) {
	p := &Problem{File: "f", Line: 1, Col: 301, Text: strings.Repeat("x", 300) + "\x1b[31mwrong" + strings.Repeat("y", 300), Msg: "wrong"}
	lines := strings.Split(p.Error(), "\n")
	if len(lines) != 3 {
		t.Fatalf("got %d lines", len(lines))
	}
	at := strings.IndexByte(lines[2], '^')
	if got := lines[1][at : at+10]; got != "?[31mwrong" {
		t.Errorf("caret stands at %q", got)
	}
}
