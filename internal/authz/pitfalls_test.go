package authz

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/casbin/casbin/v2"
	"github.com/casbin/casbin/v2/model"
	"github.com/casbin/casbin/v2/persist"
	"github.com/casbin/casbin/v2/util"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

// Casbin fails open, or over, in eighteen known ways. Each test here shows one
// way, where Casbin still has it, and that it does not lead through this
// package.

const allRow = "p, all, in, **, *, *, *, **, -, allow\n"

func get(path string) *Call {
	return &Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 443, Verb: "GET", Path: path}
}

// 1: an empty policy is judged as one row of empty fields.
func TestPitfallEmptyPolicy(t *testing.T) {
	o, err := newOracle(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*Call{get("/"), {}, {Dir: mesh.Out}} {
		if ok, _, err := o.enforce(c); ok || err != nil {
			t.Errorf("%+v: %v %v", c, ok, err)
		}
		if d := decide(t, compile(t, ""), c); d.Allow {
			t.Errorf("%+v: %+v", c, d)
		}
	}
	if ok, err := o.enforcer.Enforce("", "", "", "", "", "", (*Token)(nil), (*Call)(nil)); ok || err != nil {
		t.Errorf("empty request: %v %v", ok, err)
	}
}

// 2: what follows the 4,096th byte of a line is cut off.
func TestPitfallLongLineIsCut(t *testing.T) {
	for line := range strings.Lines(modelText) {
		if len(line) > 2048 {
			t.Errorf("a line of the model has %d bytes", len(line))
		}
	}
	cut := strings.Replace(modelText, "m = idOK(r.dir, r.src, r.dst)", "m = idOK(r.dir, r.src, r.dst)"+strings.Repeat(" ", 4096-len("m = idOK(r.dir, r.src, r.dst)")), 1)
	m, err := model.NewModelFromString(cut)
	if err != nil || len(m["m"]["m"].Value) > 100 {
		t.Fatalf("casbin has changed: %v", err)
	}
	if _, err := parseModel(cut, modelWant); err == nil {
		t.Error("a model that was cut is used")
	}
}

// 3: "#" and ";" start a comment wherever they are.
func TestPitfallCommentInValue(t *testing.T) {
	for _, mark := range []string{"#", ";"} {
		text := strings.Replace(modelText, "&& condOK", mark+" && condOK", 1)
		if m, err := model.NewModelFromString(text); err != nil || strings.Contains(m["m"]["m"].Value, "condOK") {
			t.Fatalf("casbin has changed: %v", err)
		}
		if _, err := parseModel(text, modelWant); err == nil {
			t.Errorf("a model cut by %q is used", mark)
		}
	}
	for _, text := range []string{"", "[matchers]\nm = true\n", modelText + "[role_definition]\ng = _, _\n", strings.Replace(modelText, "&&", "||", 1)} {
		if _, err := parseModel(text, modelWant); err == nil {
			t.Errorf("model %q is used", text)
		}
	}
}

// 4: an effect in any other spelling makes the row void.
func TestPitfallEffectSpelling(t *testing.T) {
	for _, eft := range []string{"Deny", "DENY", "denied", "deny ", " deny", `"deny"`, "deny\t", "", "den\u0443"} {
		s := rows(t, allRow)
		s.Rules = append(s.Rules, mesh.Rule{ID: "stop", Dir: mesh.In, Src: "**", Dst: "*", Port: "*", Verb: "*", Path: "**", Cond: "-", Effect: mesh.Effect(eft)})
		if _, err := Compile(s); err == nil {
			t.Errorf("effect %q was compiled", eft)
		}
	}
	for i, blank := range []func(*mesh.Rule){
		func(r *mesh.Rule) { r.Src = "** " }, func(r *mesh.Rule) { r.Dst += " " }, func(r *mesh.Rule) { r.Port = " *" },
		func(r *mesh.Rule) { r.Verb = "GET " }, func(r *mesh.Rule) { r.Path += "\t" }, func(r *mesh.Rule) { r.Cond = "bound " },
		func(r *mesh.Rule) { r.Dir = "in " }, func(r *mesh.Rule) { r.ID += " " },
	} {
		s := rows(t, allRow)
		blank(&s.Rules[0])
		if _, err := Compile(s); err == nil {
			t.Errorf("blank %d was compiled", i)
		}
	}
}

// 5: two rows that are equal once joined by commas are one.
func TestPitfallJoinedRowsCollide(t *testing.T) {
	for _, comma := range []func(*mesh.Rule){
		func(r *mesh.Rule) { r.ID = "a,b" }, func(r *mesh.Rule) { r.Path = "/a,b" }, func(r *mesh.Rule) { r.Cond = "claim.x=a,b" },
	} {
		s := rows(t, allRow)
		comma(&s.Rules[0])
		if _, err := Compile(s); err == nil {
			t.Errorf("%+v was compiled", s.Rules[0])
		}
	}
	m, err := parseModel(modelText, modelWant)
	if err != nil {
		t.Fatal(err)
	}
	a := mesh.Rule{ID: "r", Dir: "in", Src: "o,r", Dst: "x", Port: "*", Verb: "*", Path: "**", Cond: "-", Effect: "allow"}
	b := a
	b.Src, b.Dst = "o", "r,x"
	if err := loadRow(m, rowFields(&a)); err != nil {
		t.Fatal(err)
	}
	if err := loadRow(m, rowFields(&b)); err == nil {
		t.Error("a row was dropped without an error")
	}
}

// 6: an empty first field panics.
func TestPitfallEmptyFieldPanics(t *testing.T) {
	func() {
		defer func() {
			if recover() == nil {
				t.Error("casbin has changed: no panic")
			}
		}()
		persist.LoadPolicyArray([]string{"", "a"}, model.NewModel())
	}()
	if err := loadRow(nil, rowFields(&mesh.Rule{})); err == nil {
		t.Error("a panic while loading is no error")
	}
	s := rows(t, allRow)
	s.Rules[0].ID = ""
	if _, err := Compile(s); err == nil {
		t.Error("a row without id was compiled")
	}
}

// 7: saving writes fields unquoted, so that a line feed in one makes rows.
func TestPitfallSavingInjectsRows(t *testing.T) {
	for _, text := range []string{"x\np, evil", "x\r", "x\x00y"} {
		for _, set := range []func(*mesh.Rule){
			func(r *mesh.Rule) { r.ID = text }, func(r *mesh.Rule) { r.Src = "spiffe://corp.example/" + text },
			func(r *mesh.Rule) { r.Path = "/" + text }, func(r *mesh.Rule) { r.Cond = "iss=" + text },
		} {
			s := rows(t, allRow)
			set(&s.Rules[0])
			if _, err := Compile(s); err == nil {
				t.Errorf("%+q was compiled", s.Rules[0])
			}
		}
	}
}

// forbiddenCalls are the doors of Casbin that must stay shut: what changes a loaded
// policy, keeps decisions, runs text or turns judging off.
var forbiddenCalls = []string{
	"SavePolicy", "AddPolicy", "AddPolicies", "AddNamedPolicy", "RemovePolicy", "UpdatePolicy", "LoadPolicy", "ClearPolicy",
	"AddGroupingPolicy", "RemoveGroupingPolicy", "RemoveFilteredPolicy", "SetModel", "EnableEnforce", "EnableAcceptJsonRequest",
	"NewCachedEnforcer", "NewSyncedCachedEnforcer", "NewSyncedEnforcer", "EnforceWithMatcher", "EnforceExWithMatcher",
	"KeyMatch", "KeyMatch2", "KeyMatch3", "KeyMatch4", "KeyMatch5", "RegexMatch", "GlobMatch", "IPMatch",
	"AddNamedMatchingFunc", "GetRoleManager", "HasLink", "BuildRoleLinks",
}

// 7, 8, 9, 13, 16: the doors are not used in this package.
func TestPitfallDoorsStayShut(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) < 5 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		src, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, src, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && slices.Contains(forbiddenCalls, sel.Sel.Name) {
				t.Errorf("%s uses %s", name, sel.Sel.Name)
			}
			return true
		})
	}
	for _, word := range []string{"eval(", "keyMatch", "regexMatch", "globMatch", "ipMatch", "||", "g(", "priority", "==\""} {
		if strings.Contains(modelText, word) {
			t.Errorf("the model has %s", word)
		}
	}
}

// 8: the key of the decision cache joins fields by "$$".
func TestPitfallCacheKeyCollides(t *testing.T) {
	s := compile(t, "p, r, in, **, *, *, *, /o$$x, -, allow")
	j := judgeWith(t, audit.NewMemory(), s)
	c := get("/o$$x")
	c.Verb = "r"
	if _, err := j.Judge(c); err != nil {
		t.Error(err)
	}
	c = get("/o")
	c.Verb = "x$$r"
	if _, err := j.Judge(c); err == nil {
		t.Error("the colliding call is allowed")
	}
}

// 9: the cache survives a denial that was added, and a reload.
func TestPitfallStaleAllow(t *testing.T) {
	j := judgeWith(t, audit.NewMemory(), compile(t, "g, "+pay.String()+", group:a\np, r, in, group:a, *, *, *, **, -, allow"))
	cn := j.Conn(mesh.In, pay, bill.String(), 443)
	ask := func() bool { _, a := j.Judge(get("/x")); _, b := cn.Judge(get("/x")); return a == nil && b == nil }
	none := func() bool { _, a := j.Judge(get("/x")); _, b := cn.Judge(get("/x")); return a != nil && b != nil }
	if !ask() {
		t.Fatal("denied")
	}
	for name, csv := range map[string]string{
		"a denial was added":     "g, " + pay.String() + ", group:a\np, r, in, group:a, *, *, *, **, -, allow\np, d, in, **, *, *, *, /**, -, deny",
		"the member was removed": "g, " + inv.String() + ", group:a\np, r, in, group:a, *, *, *, **, -, allow",
		"the row was removed":    "p, other, in, **, *, *, POST, **, -, allow",
	} {
		j.Use(compile(t, csv))
		if !none() {
			t.Errorf("%s: still allowed", name)
		}
	}
}

// 10: each new path and caller stays in memory.
func TestPitfallMemoryGrows(t *testing.T) {
	s := compile(t, shop)
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range 50_000 {
		c := get(fmt.Sprintf("/v1/charges/%d", i))
		c.Src = id(fmt.Sprintf("spiffe://corp.example/ns/x/sa/u%d", i))
		s.Decide(c)
		if i%50 == 0 {
			if _, err := s.Oracle(c); err != nil {
				t.Fatal(err)
			}
		}
	}
	if after := heap(); after > before+1<<20 {
		t.Errorf("50,000 distinct calls left %d bytes", after-before)
	}
	runtime.KeepAlive(s)
}

// 11: the matching functions of Casbin match more than they seem to.
func TestPitfallMatchers(t *testing.T) {
	if !util.KeyMatch2("/v1/apiXjson", "/v1/api.json") || !util.KeyMatch("/v1/../admin", "/v1/*") {
		t.Error("casbin has changed")
	}
	for _, tc := range []struct{ pattern, path string }{
		{"/v1/api.json", "/v1/apiXjson"}, {"/v1/*", "/v1/../admin"}, {"/v1/**", "/v1/../admin"}, {"/v1/**", "/v1/%2e%2e/admin"},
		{"/v1/deploy", "/v1/deploy/"}, {"/v1/*", "/v1/a%2Fb"}, {"/v1/*", "/v1/"}, {"/v1/*", "/v1"}, {"/v1/*", "/v1/x\ny"},
		{"/v1/a", "/v1/a?x"}, {"/v1/deploy", "/admin/v1/deploy/x"}, {"/v1/**", "/v1x"}, {"/v1/**", "/V1/a"}, {"/v1/**", "/v1;a/b"},
		{"/v1/**", "//v1/a"}, {"/v1/**", "/x/../v1/a"}, {"/**", "*"}, {"/**", "-"}, {"/**", ""},
	} {
		s := compile(t, "p, r, in, **, *, *, GET, "+tc.pattern+", -, allow")
		if d := decide(t, s, get(tc.path)); d.Allow {
			t.Errorf("%q matches %q", tc.pattern, tc.path)
		}
	}
	for _, pattern := range []string{"/foo*bar", "/a|/.*", "/v1/:id{", "/v1/**/x", "*", "/**/*"} {
		if _, err := Compile(rows(t, "p, r, in, **, *, *, GET, "+pattern+", -, allow")); err == nil {
			t.Errorf("path pattern %q was compiled", pattern)
		}
	}
	out := compile(t, "p, r, out, **, host:api.stripe.com, 443, CONNECT, -, -, allow\np, w, out, **, host:*.github.com, 443, CONNECT, -, -, allow")
	for _, host := range []string{"api.stripe.comXX443", "api.stripe.comevil.example", "api.stripe.com:443", "API.stripe.com", "apiXstripe.com",
		"api.stripe.com.", ".github.com", "github.com", "a.b.github.com", "evilgithub.com", "*.github.com.evil"} {
		c := Call{Dir: mesh.Out, Src: pay, Dst: "host:" + host, Port: 443, Verb: "CONNECT", Path: "-"}
		if d := decide(t, out, &c); d.Allow {
			t.Errorf("%s is allowed by %s", host, d.Rule)
		}
	}
	src := compile(t, "p, r, in, spiffe://corp.example/*/sa/c, *, *, GET, **, -, allow")
	for _, s := range []string{"spiffe://corp.example/ns/a/sa/c", "spiffe://corp.example/ns/sa/b", "spiffe://evil.example/ns/sa/c"} {
		c := get("/")
		c.Src = id(s)
		if d := decide(t, src, c); d.Allow {
			t.Errorf("%s is allowed", s)
		}
	}
}

// 12: one bad row fails every request.
func TestPitfallOneBadRow(t *testing.T) {
	j := judgeWith(t, audit.NewMemory(), compile(t, allRow))
	s := rows(t, allRow)
	for _, bad := range []mesh.Rule{{}, {ID: "x"}, {ID: "x", Dir: "in", Src: "**", Dst: "*", Port: "*", Verb: "*", Path: "/x", Cond: "iss=", Effect: "allow"}} {
		s.Rules = append(s.Rules[:1], bad)
		if set, err := Compile(s); err == nil || set != nil {
			t.Errorf("%+v was compiled", bad)
		}
		if _, err := j.Judge(get("/y")); err != nil {
			t.Errorf("the policy before does not judge any more: %v", err)
		}
	}
	// What is no regular expression to Casbin is a plain name here.
	if d := decide(t, compile(t, "p, r, in, **, *, *, *, /x(, -, allow\n"+allRow), get("/y")); !d.Allow {
		t.Errorf("%+v", d)
	}
}

// 13: eval runs text from rows.
func TestPitfallEval(t *testing.T) {
	if util.HasEval(modelText) {
		t.Error("the model evaluates text of rows")
	}
	for _, text := range []string{"true||r.obj=='x'", "eval(true)", "true"} {
		if _, err := Compile(rows(t, "p, r, in, **, *, *, GET, /, "+text+", allow")); err == nil {
			t.Errorf("condition %q was compiled", text)
		}
	}
}

// 14: "||" without parentheses lets a caller reach anything.
func TestPitfallPrecedence(t *testing.T) {
	// With "&&" alone every column must fit: one call per column that does not.
	s := compile(t, "p, r, in, "+pay.String()+", "+bill.String()+", 443, GET, /a, env.name=prod, allow")
	fits := Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 443, Verb: "GET", Path: "/a", Environment: "prod"}
	if !decide(t, s, &fits).Allow {
		t.Fatal("denied")
	}
	for name, change := range map[string]func(*Call){
		"src": func(c *Call) { c.Src = inv }, "dst": func(c *Call) { c.Dst = inv.String() }, "port": func(c *Call) { c.Port = 444 },
		"verb": func(c *Call) { c.Verb = "PUT" }, "path": func(c *Call) { c.Path = "/b" }, "cond": func(c *Call) { c.Environment = "" },
		"dir": func(c *Call) { c.Dir, c.Dst = mesh.Out, "host:a" },
	} {
		c := fits
		change(&c)
		if decide(t, s, &c).Allow {
			t.Errorf("another %s is allowed", name)
		}
	}
}

// 15: a chain of groups longer than ten is cut.
func TestPitfallDeepGroups(t *testing.T) {
	chain := func(n int) string {
		csv := "g, " + pay.String() + ", group:g0\n"
		for i := range n - 1 {
			csv += fmt.Sprintf("g, group:g%d, group:g%d\n", i, i+1)
		}
		return csv + fmt.Sprintf("p, d, in, group:g%d, *, *, *, **, -, deny\n", n-1) + allRow
	}
	deepest := 0
	for n := 1; n < 30; n++ {
		s, err := Compile(rows(t, chain(n)))
		if err != nil {
			continue
		}
		deepest = n
		if d := decide(t, s, get("/")); d.Rule != "d" {
			t.Errorf("the denial is lost %d groups deep: %+v", n, d)
		}
	}
	if deepest < 8 || deepest > 9 {
		t.Errorf("the deepest chain that was compiled has %d groups", deepest)
	}
}

// 16: a number is not the text of it, and judging can be switched off.
func TestPitfallTypes(t *testing.T) {
	s := compile(t, allRow)
	c := get("/")
	for name, args := range map[string][]any{
		"a number for the port": {"in", pay.String(), bill.String(), 443, "GET", "/", (*Token)(nil), c},
		"JSON for a caller":     {"in", `{"a":1}`, bill.String(), "443", "GET", "/", (*Token)(nil), c},
		"a field too few":       {"in", pay.String(), bill.String(), "443", "GET", "/", (*Token)(nil)},
		"no context":            {"in", pay.String(), bill.String(), "443", "GET", "/", nil, nil},
		"another context":       {casbin.EnforceContext{}, "in", pay.String(), bill.String(), "443", "GET", "/", (*Token)(nil), c},
	} {
		if ok, _ := s.oracle.enforcer.Enforce(args...); ok {
			t.Errorf("%s is allowed", name)
		}
	}
}

// 17: with priorities the order of rows decides, and it is not stable.
func TestPitfallOrder(t *testing.T) {
	snap := rows(t, shop+allRow+"p, stop, in, **, *, 443, *, /x/**, -, deny\n")
	for range 50 {
		rand.Shuffle(len(snap.Rules), func(i, k int) { snap.Rules[i], snap.Rules[k] = snap.Rules[k], snap.Rules[i] })
		s, err := Compile(snap)
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]bool{"/x/y": false, "/y": true, "/admin/a": false} {
			if d := decide(t, s, get(path)); d.Allow != want {
				t.Errorf("%s: %+v", path, d)
			}
		}
	}
}

// 18: the role manager locks, remembers and is not safe while it reloads.
func TestPitfallRoleManager(t *testing.T) {
	s := compile(t, "g, "+pay.String()+", group:a\np, r, in, group:a, *, *, *, **, -, allow")
	if m := s.oracle.enforcer.GetModel(); len(m["g"]) != 0 {
		t.Errorf("casbin has roles: %v", m["g"])
	}
	// A caller cannot take the name of a group.
	if ok, _, _ := s.oracle.enforcer.EnforceEx("in", "group:a", bill.String(), "443", "GET", "/", (*Token)(nil), get("/")); ok {
		t.Error("the name of a group is a member of it")
	}
	if d := s.Decide(get("/")); !d.Allow {
		t.Errorf("the member is not in the group: %+v", d)
	}
}
