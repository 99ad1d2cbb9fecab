// Package house holds the law of the house: which room may import which, what
// each program must never link, and how large a room may grow.
package house

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// floors is the law: a package imports only from lower floors, never from its
// own. Moving a package is a design decision; the commit explains it.
var floors = [][]string{
	{"internal/socket", "internal/mux", "internal/leak"},
	{"internal/record"},
	{"internal/mesh", "internal/telemetry", "internal/capture", "internal/capture/redirect", "internal/http1", "internal/hop", "internal/proxyproto", "internal/socks", "internal/jose", "internal/control/meshpb", "policies"},
	{"internal/audit", "internal/store", "internal/daemon", "internal/control", "internal/svid", "internal/attest", "internal/policyset", "internal/gatewayapi", "internal/http2", "internal/isolate", "internal/archive"},
	{"internal/ca", "internal/authz", "internal/upstream", "internal/route", "internal/registry", "internal/agent", "internal/federation", "internal/conform", "internal/sink", "internal/keyset", "internal/stepca", "internal/handover", "internal/virtual", "internal/shadow", "internal/translate", "internal/region", "internal/rollout", "internal/chart", "internal/tap"},
	{"internal/egress", "internal/nameserver", "internal/proxy", "internal/review", "internal/page"},
	{"cmd/issuer", "cmd/gateway", "cmd/sidecar", "cmd/sallyport", "cmd/injector"},
}

// beside lists what stands next to the house. The suites and the test network
// are imported by tests only, and nothing may import a bench.
var beside = []string{
	"internal/meshtest", "internal/scripttest", "internal/store/storetest", "internal/store/postgrestest", "internal/attest/attesttest", "internal/jose/josetest", "internal/translate/translatetest", "internal/page/pagetest",
	"bench", "bench/egress", "bench/rig", "bench/issuer", "bench/fleet", "bench/http1", "bench/memory", "bench/h2",
	"bench/tcp", "bench/route", "bench/handshake", "bench/attack", "bench/dns", "bench/shadow", "test",
}

// never lists what must not be linked into a program, however indirectly.
var never = map[string]map[string]string{
	"cmd/issuer":    {"internal/capture/redirect": "an issuer captures nobody"},
	"cmd/sidecar":   {"internal/ca": "a sidecar cannot sign", "internal/store": "a sidecar keeps no database"},
	"cmd/gateway":   {"internal/ca": "a gateway cannot sign", "internal/store": "a gateway keeps no database", "internal/capture/redirect": "a gateway captures nobody"},
	"cmd/injector":  {"internal/ca": "an injector cannot sign", "internal/store": "an injector keeps no database", "internal/control": "an injector speaks to no issuer", "internal/capture/redirect": "an injector captures nobody"},
	"cmd/sallyport": {"internal/ca": "the CLI holds no signing key", "internal/capture/redirect": "the CLI captures nobody"},
}

// rooms names the only packages that may import a heavy dependency directly.
var rooms = map[string][]string{
	"filippo.io/age":                             {"internal/archive"},
	"github.com/miekg/dns":                       {"internal/egress", "internal/nameserver", "cmd/sallyport"},
	"github.com/casbin/casbin/v2":                {"internal/authz"},
	"github.com/golang-jwt/jwt/v5":               {"internal/authz", "internal/ca", "internal/stepca"},
	"github.com/smallstep/certificates":          {"internal/ca", "internal/stepca"},
	"go.step.sm/crypto":                          {"internal/ca", "internal/stepca"},
	"golang.org/x/crypto":                        {"internal/authz", "internal/ca", "internal/record"},
	"modernc.org/sqlite":                         {"internal/store"},
	"github.com/jackc/pgx/v5":                    {"internal/store", "internal/store/postgrestest"},
	"golang.org/x/mod":                           {"internal/audit"},
	"github.com/pressly/goose/v3":                {"internal/store"},
	"github.com/prometheus/client_golang":        {"internal/telemetry"},
	"github.com/goccy/go-yaml":                   {"internal/mesh"},
	"github.com/fsnotify/fsnotify":               {"internal/daemon"},
	"github.com/google/nftables":                 {"internal/capture/redirect"},
	"github.com/mdlayher/netlink":                {"internal/capture/redirect"},
	"github.com/spf13/cobra":                     {"internal/daemon", "cmd/issuer", "cmd/sallyport", "cmd/sidecar"},
	"github.com/spiffe/go-spiffe/v2/spiffetls":   {},
	"github.com/spiffe/go-spiffe/v2/workloadapi": {},
	"github.com/spiffe/spire-api-sdk":            {"internal/control", "internal/conform"},
	"github.com/envoyproxy/go-control-plane":     {"internal/svid"},
	"google.golang.org/grpc":                     {"internal/control", "internal/control/meshpb", "internal/svid", "internal/conform", "internal/sink", "internal/translate"},
	"connectrpc.com/vanguard":                    {"internal/translate"},
	"connectrpc.com/connect":                     {"internal/translate"},
	"github.com/jhump/protoreflect/v2":           {"internal/translate"},
	"github.com/oschwald/maxminddb-golang/v2":    {"internal/region"},
	"github.com/twmb/franz-go":                   {"internal/sink"},
	"github.com/minio/minio-go/v7":               {"internal/sink"},
	"go.opentelemetry.io/proto/slim/otlp":        {"internal/sink"},
	"unsafe":                                     {"internal/capture", "internal/control/meshpb", "internal/isolate"},
}

const (
	maxFile = 600 // lines, of a file a person wrote
	maxFunc = 80  // lines
	maxMain = 40  // lines of a main.go
)

type pkg struct {
	ImportPath, Dir string
	GoFiles         []string
	Imports, Deps   []string
	Module          *struct{ Path string }
}

func TestHouse(t *testing.T) {
	mod, pkgs := list(t)
	for _, v := range wiring(mod, pkgs) {
		t.Error(v)
	}
	for _, p := range pkgs {
		for _, f := range p.GoFiles {
			file := filepath.Join(p.Dir, f)
			for _, v := range shape(strings.TrimPrefix(p.ImportPath, mod), f, file, nil) {
				t.Error(v)
			}
		}
		if n := introductions(t, p); n != 1 {
			t.Errorf("%s has %d package comments, want exactly 1", p.ImportPath, n)
		}
	}
}

// TestLawBites shows that each rule catches a fabricated offender.
func TestLawBites(t *testing.T) {
	const m = "example.org/house/"
	for _, tt := range []struct {
		name, want string
		p          pkg
	}{
		{"import upwards", "may not import", pkg{ImportPath: m + "internal/upstream", Imports: []string{m + "internal/proxy"}}},
		{"import sideways", "may not import", pkg{ImportPath: m + "internal/authz", Imports: []string{m + "internal/ca"}}},
		{"import of a test room", "only tests may", pkg{ImportPath: m + "internal/authz", Imports: []string{m + "internal/meshtest"}}},
		{"a room on no floor", "stands on no floor", pkg{ImportPath: m + "internal/extra"}},
		{"a name that says nothing", "name the package", pkg{ImportPath: m + "internal/util"}},
		{"a sidecar that links the signer", "a sidecar cannot sign", pkg{ImportPath: m + "cmd/sidecar", Deps: []string{m + "internal/ca"}}},
		{"a gateway that links the database", "keeps no database", pkg{ImportPath: m + "cmd/gateway", Deps: []string{m + "internal/store"}}},
		{"a CLI that links the signer", "holds no signing key", pkg{ImportPath: m + "cmd/sallyport", Deps: []string{m + "internal/ca"}}},
		{"a heavy dependency outside its room", "which lives in", pkg{ImportPath: m + "internal/upstream", Imports: []string{"github.com/miekg/dns"}}},
		{"a dependency that nobody may have", "which lives in", pkg{ImportPath: m + "internal/svid", Imports: []string{"github.com/spiffe/go-spiffe/v2/workloadapi"}}},
		{"unsafe outside capture", "which lives in", pkg{ImportPath: m + "internal/http1", Imports: []string{"unsafe"}}},
	} {
		tt.p.GoFiles = []string{"x.go"}
		got := strings.Join(wiring(m, []pkg{tt.p}), "\n")
		if !strings.Contains(got, tt.want) {
			t.Errorf("%s: no complaint %q about %s, got:\n%s", tt.name, tt.want, tt.p.ImportPath, got)
		}
	}
	for _, tt := range []struct{ name, file, src, want string }{
		{"a long function", "x.go", "package x\nfunc f() {\n" + strings.Repeat("_ = 1\n", maxFunc) + "}\n", "f has"},
		{"a long file", "x.go", "package x\n" + strings.Repeat("// line\n", maxFile), "the limit is 600"},
		{"a long main", "main.go", "package main\n" + strings.Repeat("// line\n", maxMain), "the limit is 40"},
		{"an init function", "x.go", "package x\nfunc init() {}\n", "no init"},
	} {
		got := strings.Join(shape("cmd/x", tt.file, tt.file, []byte(tt.src)), "\n")
		if !strings.Contains(got, tt.want) {
			t.Errorf("%s: no complaint %q, got:\n%s", tt.name, tt.want, got)
		}
	}
	if got := shape("cmd/x", "x.go", "x.go", []byte("package x\nfunc f() {}\n")); len(got) > 0 {
		t.Errorf("the law bites the innocent: %v", got)
	}
}

func list(t *testing.T) (mod string, ps []pkg) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,Imports,Deps,Module", "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			return mod, ps
		} else if err != nil {
			t.Fatal(err)
		}
		mod = p.Module.Path + "/"
		if strings.HasPrefix(p.ImportPath, mod) && len(p.GoFiles) > 0 {
			ps = append(ps, p)
		}
	}
}

// wiring checks who imports whom.
func wiring(mod string, pkgs []pkg) (bad []string) {
	say := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }
	floorOf, seen := map[string]int{}, map[string]bool{}
	for i, f := range floors {
		for _, p := range f {
			floorOf[p] = i
		}
	}
	for _, p := range pkgs {
		name := strings.TrimPrefix(p.ImportPath, mod)
		seen[name] = true
		fl, ok := floorOf[name]
		if aside := slices.Contains(beside, name); aside {
			continue
		} else if !ok {
			say("%s stands on no floor: add it to floors, or merge it into a neighbour", name)
		}
		switch filepath.Base(name) {
		case "util", "utils", "common", "helpers", "misc", "lib", "base", "types":
			say("%s: name the package for what it does", name)
		}
		for _, imp := range p.Imports {
			if dep, own := strings.CutPrefix(imp, mod); own {
				if slices.Contains(beside, dep) {
					say("%s imports %s: only tests may", name, dep)
				} else if floorOf[dep] >= fl {
					say("%s (floor %d) may not import %s (floor %d)", name, fl, dep, floorOf[dep])
				}
			}
			for heavy, in := range rooms {
				if strings.HasPrefix(imp+"/", heavy+"/") && !slices.Contains(in, name) {
					say("%s imports %s, which lives in %v", name, imp, in)
				}
			}
		}
		for _, imp := range p.Deps {
			if why := never[name][strings.TrimPrefix(imp, mod)]; why != "" {
				say("%s links %s: %s", name, imp, why)
			}
		}
	}
	for name := range floorOf {
		if !seen[name] && len(pkgs) > 1 {
			say("floors names %s, which is gone", name)
		}
	}
	return bad
}

// shape checks the size of one file and of its functions. src is read from
// path when nil.
func shape(name, f, path string, src any) (bad []string) {
	if strings.HasSuffix(f, ".pb.go") {
		return nil
	}
	if b, ok := src.([]byte); ok && b == nil {
		src = nil
	}
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, path, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return []string{err.Error()}
	}
	limit := maxFile
	if f == "main.go" && strings.HasPrefix(name, "cmd/") {
		limit = maxMain
	}
	if n := fset.File(file.Pos()).LineCount(); n > limit {
		bad = append(bad, fmt.Sprintf("%s/%s has %d lines, the limit is %d", name, f, n, limit))
	}
	for _, d := range file.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		if fn.Recv == nil && fn.Name.Name == "init" {
			bad = append(bad, fmt.Sprintf("%s/%s: no init; write the table out", name, f))
		}
		if n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1; n > maxFunc {
			bad = append(bad, fmt.Sprintf("%s/%s: %s has %d lines, the limit is %d", name, f, fn.Name.Name, n, maxFunc))
		}
	}
	return bad
}

// introductions counts the package comments of p.
func introductions(t *testing.T, p pkg) (n int) {
	for _, f := range p.GoFiles {
		if strings.HasSuffix(f, ".pb.go") {
			if n == 0 && len(p.GoFiles) > 0 && !slices.ContainsFunc(p.GoFiles, func(f string) bool { return !strings.HasSuffix(f, ".pb.go") }) {
				return 1 // wholly generated
			}
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Fatal(err)
		}
		if file.Doc != nil {
			n++
		}
	}
	return n
}
