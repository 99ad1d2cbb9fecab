package authz

import (
	"testing"

	"sallyport/internal/http1"
)

// FuzzPathForm holds the form in which paths are judged against the engine that
// brings them into it: a path is judged exactly if the engine leaves it as it
// is.
func FuzzPathForm(f *testing.F) {
	for _, p := range []string{"/", "/a/../b", "/a/./b", "//a", "/%61", "/%2f", "/%C3%A9", "/%c3", "/a;b", "/a[b]|^", "/...", "/a/..b", "/%25", "*", ""} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if p == "-" {
			return
		}
		out, err := http1.CleanPath(nil, []byte(p), false)
		if same := err == nil && string(out) == p; same != cleanPath(p) {
			t.Errorf("%q: the engine makes it %q (%v), judged: %v", p, out, err, !same)
		}
		if err == nil && !cleanPath(string(out)) {
			t.Errorf("%q: the engine makes it %q, which is not judged", p, out)
		}
	})
}
