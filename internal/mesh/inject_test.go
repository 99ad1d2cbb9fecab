package mesh

import "testing"

func TestCredentialsOfAllPaths(t *testing.T) {
	for _, tt := range []struct {
		name  string
		paths []string
		all   bool
	}{
		{"none", nil, false},
		{"any", []string{"**"}, true},
		{"any below the root", []string{"/**"}, true},
		{"the root alone", []string{"/"}, false},
		{"all but the root", []string{"/*/**"}, false},
		{"all but the root, and that", []string{"/*/**", "/"}, true},
		{"one segment and more, without what ends in a slash", []string{"/", "/*", "/*/*/**"}, false},
		{"one segment and more", []string{"/", "/*", "/*/", "/*/*/**"}, true},
		{"some", []string{"/v1/**", "/v2/**"}, false},
		{"up to a depth", []string{"/", "/*", "/*/", "/*/*", "/*/*/"}, false},
	} {
		if got := (&Inject{Paths: tt.paths}).always(); got != tt.all {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}
