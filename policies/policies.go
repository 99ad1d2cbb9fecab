// Package policies holds the reviewed policy files of the demo, so that the
// demo and the tests use the very files that people read.
package policies

import "embed"

// FS is the folder: the CSV and YAML files, routes/ and tests/.
//
//go:embed *.csv *.yaml routes/*.yaml tests/*.yaml
var FS embed.FS
