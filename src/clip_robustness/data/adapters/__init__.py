"""One file a family of data sets: from where files lie to the images' ids, labels and attributes.

The adapter of a family is the module of that name here, with a function ``adapt(members, space, where, options)``:

* `members`: every file of the data set's archives (`data.rows.Member`), images or not, sorted. `data.members`
  has `images` to choose the images, `read` for the bytes of a label file, `group_by_key` for webdataset
  shards and `columns` for the other columns of a parquet file.
* `space`: the label space. `where`: names the sources in errors. `options`: the data set's own `options`.

It returns one `data.rows.Row` an image; all rows have the same attributes. A new family is a new file.
"""
