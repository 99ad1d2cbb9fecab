package daemon

import (
	"fmt"
	"runtime/debug"
	"sync"
)

// Version says from what this program was built.
var Version = sync.OnceValue(func() string {
	b, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	return DescribeBuild(b)
})

// DescribeBuild says from what a program was built: its commit, or its version
// where the commit is not known, and its Go.
func DescribeBuild(b *debug.BuildInfo) string {
	v := b.Main.Version
	for _, s := range b.Settings {
		if s.Key == "vcs.revision" {
			v = fmt.Sprintf("%.12s", s.Value)
		}
		if s.Key == "vcs.modified" && s.Value == "true" {
			v += "+changes"
		}
	}
	return v + " " + b.GoVersion
}
